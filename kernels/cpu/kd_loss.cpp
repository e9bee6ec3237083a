// Distillation losses on the CPU: per row, one sweep for the exponentials, one for the loss, one for each gradient
// that is wanted, all on a copy of the row that stays in the first-level cache.
#include "../kernels.h"
#include "simd.h"
#include "workspace.h"

namespace vitkd::cpu::VITKD_ISA {

namespace {

constexpr double kLog2E = 1.4426950408889634;

// Sums go round 64 bytes' worth of vectors, so that every instruction set adds up a thousand classes in as many partial
// sums: in four lanes alone their error is twice that of sixteen.
template <class T>
struct Sum {
  static constexpr int64_t kParts = 4;
  Vec<T> parts[kParts] = {};
  Vec<T>& at(int64_t c) { return parts[c / kLanes<T> % kParts]; }
  T total() const { return sum<T>((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

float log_of(float x) { return __builtin_logf(x); }
double log_of(double x) { return __builtin_log(x); }

// A row's logits become the logarithms of its probabilities; the probabilities go to `p`. The maximum is taken off
// before anything is scaled: a scaled logit of 1e4 would already be 5e-4 off.
template <class T>
void log_softmax(T* logits, T* p, int64_t width, T temperature) {
  Vec<T> most = load(logits);
  for (int64_t c = kLanes<T>; c < width; c += kLanes<T>) most = maximum<T>(load(logits + c), most);
  const Vec<T> peak = broadcast(max<T>(most));
  Sum<T> total;
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    const Vec<T> shifted = (load(logits + c) - peak) / temperature, e = exp2(shifted * T(kLog2E));
    store(logits + c, shifted);
    store(p + c, e);
    total.at(c) += e;
  }
  const T z = total.total();
  const T log_z = log_of(z), inverse = T(1) / z;
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    store(logits + c, load(logits + c) - log_z);
    store(p + c, load(p + c) * inverse);
  }
}

// log((1 + x) / 2) for 0 <= x <= 1: 2 atanh(y) with y = (x - 1) / (x + 3) >= -1/3, by its series; exactly 0 at 1.
template <class T>
Vec<T> log_half_1p(Vec<T> x) {
  const Vec<T> y = (x - T(1)) / (x + T(3)), y2 = y * y;
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;
  Vec<T> p = broadcast(T(1) / T(2 * terms - 1));
  for (int k = terms - 2; k >= 0; --k) p = p * y2 + T(1) / T(2 * k + 1);
  return p * y * T(2);
}

// log of p over the mean of p and q, from log q - log p alone
template <class T>
Vec<T> log_over_mean(Vec<T> other) {
  const Vec<T> zero = {}, size = other > zero ? other : -other;
  return (other > zero ? -other : zero) - log_half_1p<T>(exp2(-size * T(kLog2E)));
}

// One side of a divergence: the gradient of sum(p r) through p's own softmax is p (r - sum(p r)).
template <class T>
void weigh(const T* p, const T* ratio, T total, T factor, int64_t width, T* out) {
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    store(out + c, load(p + c) * (load(ratio + c) - total) * factor);
  }
}

template <class T>
T dot(const T* a, const T* b, int64_t width) {
  Sum<T> total;
  for (int64_t c = 0; c < width; c += kLanes<T>) total.at(c) += load(a + c) * load(b + c);
  return total.total();
}

template <class T>
struct Row {
  int64_t classes, width;  // width: classes, padded to whole vectors
  T temperature;
  T *s, *t;          // logits, then log2 probabilities
  T *q, *p;          // probabilities of student and teacher
  T *grad_s, *grad_t;  // null when not wanted
};

// KL(first || second) = sum(p_first (log p_first - log p_second)), its gradients to both sides.
template <class T>
T kl(const Row<T>& row, const T* p_first, T* log_first, T* grad_first, const T* p_second, const T* log_second,
     T* grad_second) {
  const T temperature = row.temperature;
  for (int64_t c = 0; c < row.width; c += kLanes<T>) store(log_first + c, load(log_first + c) - load(log_second + c));
  for (int64_t c = row.classes; c < row.width; ++c) log_first[c] = 0;
  const T total = dot(p_first, log_first, row.width);
  if (grad_first) weigh(p_first, log_first, total, temperature, row.width, grad_first);
  if (grad_second) {
    for (int64_t c = 0; c < row.width; c += kLanes<T>) {
      store(grad_second + c, (load(p_second + c) - load(p_first + c)) * temperature);
    }
  }
  return total * temperature * temperature;
}

template <class T>
T js(const Row<T>& row) {
  for (int64_t c = 0; c < row.width; c += kLanes<T>) {
    const Vec<T> d = load(row.t + c) - load(row.s + c);
    store(row.s + c, log_over_mean<T>(d));
    store(row.t + c, log_over_mean<T>(-d));
  }
  for (int64_t c = row.classes; c < row.width; ++c) row.s[c] = row.t[c] = 0;
  const T total_s = dot(row.q, row.s, row.width), total_t = dot(row.p, row.t, row.width);
  const T factor = row.temperature / T(2);
  if (row.grad_s) weigh(row.q, row.s, total_s, factor, row.width, row.grad_s);
  if (row.grad_t) weigh(row.p, row.t, total_t, factor, row.width, row.grad_t);
  return (total_s + total_t) * factor * row.temperature;
}

// l1 and mse: the padding is equal on both sides, so it adds nothing.
template <class T>
T difference(const Row<T>& row, bool squared) {
  const T per_class = T(1) / T(row.classes);
  Sum<T> total;
  for (int64_t c = 0; c < row.width; c += kLanes<T>) {
    const Vec<T> d = load(row.s + c) - load(row.t + c);
    const Vec<T> one = broadcast(T(1));
    const Vec<T> sign = d > T(0) ? one : (d < T(0) ? -one : Vec<T>{});
    total.at(c) += squared ? d * d : d * sign;
    const Vec<T> grad = (squared ? d * T(2) : sign) * per_class;
    if (row.grad_s) store(row.grad_s + c, grad);
    if (row.grad_t) store(row.grad_t + c, -grad);
  }
  return total.total() * per_class;
}

template <class T>
T row_loss(const Row<T>& row, KDKind kind) {
  if (kind == KDKind::l1 || kind == KDKind::mse) return difference(row, kind == KDKind::mse);
  log_softmax(row.s, row.q, row.width, row.temperature);
  log_softmax(row.t, row.p, row.width, row.temperature);
  if (kind == KDKind::kl) return kl(row, row.p, row.t, row.grad_t, row.q, row.s, row.grad_s);
  if (kind == KDKind::reverse_kl) return kl(row, row.q, row.s, row.grad_s, row.p, row.t, row.grad_t);
  return js(row);
}

template <class S>
void rows(const KDLoss& args, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const bool softened = args.kind != KDKind::l1 && args.kind != KDKind::mse;
  const T fill = softened ? -__builtin_inf() : T(0);
  Workspace memory;
  Row<T> row{args.classes, pad<T>(args.classes), T(args.temperature), {}, {}, {}, {}, {}, {}};
  row.s = memory.take<T>(row.width);
  row.t = memory.take<T>(row.width);
  row.q = memory.take<T>(row.width);
  row.p = memory.take<T>(row.width);
  if (args.student_grad) row.grad_s = memory.take<T>(row.width);
  if (args.teacher_grad) row.grad_t = memory.take<T>(row.width);
  for (int64_t i = begin; i < end; ++i) {
    unpack(static_cast<const S*>(args.student) + i * args.student_stride, args.classes, T(1), row.s, row.width, fill);
    unpack(static_cast<const S*>(args.teacher) + i * args.teacher_stride, args.classes, T(1), row.t, row.width, fill);
    static_cast<T*>(args.loss)[i] = row_loss(row, args.kind);
    const int64_t out = i * args.classes;
    if (row.grad_s) pack(row.grad_s, args.classes, T(1), static_cast<S*>(args.student_grad) + out);
    if (row.grad_t) pack(row.grad_t, args.classes, T(1), static_cast<S*>(args.teacher_grad) + out);
  }
}

}  // namespace

void kd_loss(const KDLoss& args, ParallelFor parallel_for) {
  auto body = [](int64_t begin, int64_t end, void* context) {
    const KDLoss& args = *static_cast<const KDLoss*>(context);
    switch (args.dtype) {
      case DType::float32: return rows<float>(args, begin, end);
      case DType::bfloat16: return rows<bf16>(args, begin, end);
      case DType::float16: return rows<f16>(args, begin, end);
      case DType::float64: return rows<double>(args, begin, end);
    }
  };
  const int64_t grain = 8192 / (args.classes + 1) + 1;  // some ten microseconds of work for a thread
  parallel_for(args.rows, grain, body, const_cast<KDLoss*>(&args));
}

}  // namespace vitkd::cpu::VITKD_ISA
