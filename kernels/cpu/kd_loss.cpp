// Distillation losses on the CPU: per row, one sweep for the exponentials, one for the loss, one for each gradient
// that is wanted, all on a copy of the row that stays in the first-level cache.
#include "../kernels.h"
#include "simd.h"
#include "workspace.h"

namespace vitkd::cpu::VITKD_ISA {

namespace {

constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2E = 1.4426950408889634;

// A row's logits, in units of log 2, become log2 of its probabilities; the probabilities go to `p`.
template <class T>
void log2_softmax(T* logits, T* p, int64_t width) {
  Vec<T> most = load(logits);
  for (int64_t c = kLanes<T>; c < width; c += kLanes<T>) most = maximum<T>(load(logits + c), most);
  const Vec<T> peak = broadcast(max<T>(most));
  Vec<T> total = {};
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    const Vec<T> shifted = load(logits + c) - peak, e = exp2(shifted);
    store(logits + c, shifted);
    store(p + c, e);
    total += e;
  }
  const T z = sum<T>(total);
  const T log_z = log2_of(z), inverse = T(1) / z;
  for (int64_t c = 0; c < width; c += kLanes<T>) {
    store(logits + c, load(logits + c) - log_z);
    store(p + c, load(p + c) * inverse);
  }
}

// log2(2^a + 2^b) - 1, which is log2 of the mean of both
template <class T>
Vec<T> log2_mean(Vec<T> a, Vec<T> b) {
  const Vec<T> high = a > b ? a : b, low = a > b ? b : a;
  return high + log2_1p<T>(exp2(low - high)) - T(1);
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
  Vec<T> total = {};
  for (int64_t c = 0; c < width; c += kLanes<T>) total += load(a + c) * load(b + c);
  return sum<T>(total);
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
  if (grad_first) weigh(p_first, log_first, total, temperature * T(kLn2), row.width, grad_first);
  if (grad_second) {
    for (int64_t c = 0; c < row.width; c += kLanes<T>) {
      store(grad_second + c, (load(p_second + c) - load(p_first + c)) * temperature);
    }
  }
  return total * T(kLn2) * temperature * temperature;
}

template <class T>
T js(const Row<T>& row) {
  for (int64_t c = 0; c < row.width; c += kLanes<T>) {
    const Vec<T> s = load(row.s + c), t = load(row.t + c), mean = log2_mean<T>(s, t);
    store(row.s + c, s - mean);
    store(row.t + c, t - mean);
  }
  for (int64_t c = row.classes; c < row.width; ++c) row.s[c] = row.t[c] = 0;
  const T total_s = dot(row.q, row.s, row.width), total_t = dot(row.p, row.t, row.width);
  const T factor = row.temperature * T(kLn2 / 2);
  if (row.grad_s) weigh(row.q, row.s, total_s, factor, row.width, row.grad_s);
  if (row.grad_t) weigh(row.p, row.t, total_t, factor, row.width, row.grad_t);
  return (total_s + total_t) * factor * row.temperature;
}

// l1 and mse: the padding is equal on both sides, so it adds nothing.
template <class T>
T difference(const Row<T>& row, bool squared) {
  const T per_class = T(1) / T(row.classes);
  Vec<T> total = {};
  for (int64_t c = 0; c < row.width; c += kLanes<T>) {
    const Vec<T> d = load(row.s + c) - load(row.t + c);
    const Vec<T> one = broadcast(T(1));
    // sign(NaN) is NaN, as torch has it
    const Vec<T> sign = d != d ? d : (d > T(0) ? one : (d < T(0) ? -one : Vec<T>{}));
    total += squared ? d * d : d * sign;
    const Vec<T> grad = (squared ? d * T(2) : sign) * per_class;
    if (row.grad_s) store(row.grad_s + c, grad);
    if (row.grad_t) store(row.grad_t + c, -grad);
  }
  return sum<T>(total) * per_class;
}

template <class T>
T row_loss(const Row<T>& row, KDKind kind) {
  if (kind == KDKind::l1 || kind == KDKind::mse) return difference(row, kind == KDKind::mse);
  log2_softmax(row.s, row.q, row.width);
  log2_softmax(row.t, row.p, row.width);
  if (kind == KDKind::kl) return kl(row, row.p, row.t, row.grad_t, row.q, row.s, row.grad_s);
  if (kind == KDKind::reverse_kl) return kl(row, row.q, row.s, row.grad_s, row.p, row.t, row.grad_t);
  return js(row);
}

template <class S>
void rows(const KDLoss& args, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const bool softened = args.kind != KDKind::l1 && args.kind != KDKind::mse;
  const T scale = softened ? T(kLog2E / args.temperature) : T(1);
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
    unpack(static_cast<const S*>(args.student) + i * args.student_stride, args.classes, scale, row.s, row.width, fill);
    unpack(static_cast<const S*>(args.teacher) + i * args.teacher_stride, args.classes, scale, row.t, row.width, fill);
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
