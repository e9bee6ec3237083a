// Distillation losses on the CPU. A row of logits is read for its maximum, then, from the first-level cache, for its
// exponentials, the loss and the gradients: three sweeps, and one more for js. Rows are too short for the hardware to
// find out where memory is read next, so the first sweep asks for the next row.
#include "../kernels.h"
#include "shares.h"
#include "sums.h"
#include "workspace.h"

namespace vitkd::cpu::VITKD_ISA {

namespace {

constexpr int64_t kFarthest = 4096;  // elements ahead of those that are read, of which memory is asked for

// body(first class, part of a Sum, how many classes) for every vector of a row; all are whole but the last, and say so
// by a constant, which leaves nothing of the care that the last one takes.
template <class T, class Body, class... Sums>
inline void sweep(int64_t classes, Body body, Sums&... sums) {
  constexpr int64_t lanes = kLanes<T>, section = 4 * lanes * Sum<T>::kSection;
  int64_t c = 0;
  for (; c + 4 * lanes <= classes; c += 4 * lanes) {
    if (c > 0 && c % section == 0) (sums.end_section(), ...);
    VITKD_UNROLL
    for (int part = 0; part < 4; ++part) body(c + part * lanes, part, std::integral_constant<int64_t, lanes>{});
  }
  VITKD_UNROLL
  for (int part = 0; part < 3; ++part) {
    if (c + lanes > classes) break;
    body(c, part, std::integral_constant<int64_t, lanes>{});
    c += lanes;
  }
  if (c < classes) body(c, 3, classes - c);
}

// log(1 + x / 2) for -1 <= x <= 0: 2 atanh(y) with y = x / (x + 4) >= -1/3, by its series.
template <class T>
inline Vec<T> log_1p_half(Vec<T> x) {
  const Vec<T> y = x / (x + T(4)), y2 = y * y;
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;
  Vec<T> p = broadcast(T(1) / T(2 * terms - 1));
  VITKD_UNROLL
  for (int k = terms - 2; k >= 0; --k) p = p * y2 + T(1) / T(2 * k + 1);
  return p * y * T(2);
}

// The logs of q and of p over their mean.
template <class T>
struct OverMean {
  Vec<T> q, p;
};

// ... from log q - log p alone. Where the two nearly agree, what is left of both sides of js is second order in this;
// so the ratio is kept as its distance from 1, which is exact there.
template <class T>
inline OverMean<T> over_mean(Vec<T> log_ratio) {
  const Vec<T> zero = {}, above = log_ratio > zero ? log_ratio : zero, below = log_ratio > zero ? zero : log_ratio;
  const Vec<T> rest = log_1p_half<T>(exp_minus_1(below - above));
  return {below - rest, -above - rest};
}

// One row. s and t are its logits; q and p are scratch for the exponentials, whole vectors.
template <class S>
struct Row {
  using T = Compute<S>;
  int64_t classes;
  T temperature, weight;
  const S *s, *t;
  int64_t ahead_s, ahead_t;  // from an element to what memory is asked for meanwhile: that of the next row, if not far
  T *q, *p;
  S *grad_s, *grad_t;  // null when not wanted

  template <class Count>
  void store_grads(int64_t c, Count count, Vec<T> student, Vec<T> teacher) const {
    if (grad_s) store_narrow(grad_s + c, student, count);
    if (grad_t) store_narrow(grad_t + c, teacher, count);
  }
};

// What a row's softmaxes are made of: log p - log q is (t - s - shift) / T + log_ratio, p is row.p / sum_p.
template <class T>
struct Softmaxes {
  T peak_s, peak_t;
  T sum_s, sum_t;   // of the exponentials
  T weighed;        // the sum of (first's exponential) * (first's logit - second's), less the maxima
  T log_ratio;      // log(sum_s / sum_t)
};

// Distances from the maximum, whose difference is exact enough for networks that nearly agree; the maximum comes off
// before anything is scaled, for a scaled logit of 1e4 would already be 5e-4 off.
template <class S, class T, class Count>
inline Vec<T> below(const S* logits, int64_t c, Count count, T peak) {
  return first_lanes<T>(load_wide(logits + c, count) - peak, count, T(0));
}

template <class S, class T = Compute<S>>
T largest(const S* logits, int64_t ahead, int64_t classes) {
  Vec<T> most[4];
  VITKD_UNROLL
  for (int i = 0; i < 4; ++i) most[i] = broadcast(T(-__builtin_inf()));
  sweep<T>(classes, [&](int64_t c, int part, auto count) {
    __builtin_prefetch(logits + c + ahead);
    most[part] = maximum<T>(first_lanes<T>(load_wide(logits + c, count), count, T(-__builtin_inf())), most[part]);
  });
  return max<T>(maximum<T>(maximum<T>(most[0], most[1]), maximum<T>(most[2], most[3])));
}

// `reverse` weighs by the student's probabilities instead of the teacher's.
template <bool reverse, class S>
Softmaxes<Compute<S>> softmaxes(const Row<S>& row) {
  using T = Compute<S>;
  const S *const row_s = row.s, *const row_t = row.t;  // no store below changes these four
  T *const row_q = row.q, *const row_p = row.p;
  const T scale = T(kLog2E / double(row.temperature));
  Softmaxes<T> result;
  result.peak_s = largest(row_s, row.ahead_s, row.classes);
  result.peak_t = largest(row_t, row.ahead_t, row.classes);
  Sum<T> sum_s, sum_t, weighed;
  sweep<T>(row.classes, [&](int64_t c, int part, auto count) {
    const Vec<T> s = below(row_s, c, count, result.peak_s), t = below(row_t, c, count, result.peak_t);
    const Vec<T> q = first_lanes<T>(exp2(s * scale), count, T(0)), p = first_lanes<T>(exp2(t * scale), count, T(0));
    store(row_q + c, q);
    store(row_p + c, p);
    sum_s.parts[part] += q;
    sum_t.parts[part] += p;
    weighed.parts[part] += reverse ? q * (s - t) : p * (t - s);
  }, sum_s, sum_t, weighed);
  result.sum_s = sum<T>(sum_s.total());
  result.sum_t = sum<T>(sum_t.total());
  result.weighed = sum<T>(weighed.total());
  result.log_ratio = T(__builtin_log(double(result.sum_s) / double(result.sum_t)));
  return result;
}

// KL(first || second) T^2: the sum of p (log p - log q) and its gradients, p (log p - log q - the sum) and q - p.
template <bool reverse, class S>
Compute<S> kl(const Row<S>& row) {
  using T = Compute<S>;
  const Softmaxes<T> soft = softmaxes<reverse>(row);
  const T inverse = T(1) / row.temperature, log_ratio = reverse ? -soft.log_ratio : soft.log_ratio;
  const T divergence = soft.weighed / (reverse ? soft.sum_s : soft.sum_t) * inverse + log_ratio;
  if (row.grad_s || row.grad_t) {
    const T factor = row.temperature * row.weight, of_s = factor / soft.sum_s, of_t = factor / soft.sum_t;
    // In this form each gradient is the same to the last bit whether or not the other is wanted, whatever the compiler
    // makes one instruction of.
    const T rest = log_ratio - divergence, ratio = soft.sum_s / soft.sum_t;
    sweep<T>(row.classes, [&](int64_t c, int, auto count) {
      const Vec<T> q = load(row.q + c), p = load(row.p + c);
      const Vec<T> s = below(row.s, c, count, soft.peak_s), t = below(row.t, c, count, soft.peak_t);
      const Vec<T> apart = (q - p * ratio) * of_s;
      if (reverse) row.store_grads(c, count, q * of_s * ((s - t) * inverse + rest), -apart);
      else row.store_grads(c, count, apart, p * of_t * ((t - s) * inverse + rest));
    });
  }
  return divergence * row.temperature * row.temperature;
}

template <class S>
Compute<S> js(const Row<S>& row) {
  using T = Compute<S>;
  const Softmaxes<T> soft = softmaxes<false>(row);
  const T inverse = T(1) / row.temperature, of_s = T(1) / soft.sum_s, of_t = T(1) / soft.sum_t;
  auto log_q_over_p = [&](int64_t c, auto count) {
    const Vec<T> s = below(row.s, c, count, soft.peak_s), t = below(row.t, c, count, soft.peak_t);
    return (s - t) * inverse - soft.log_ratio;
  };
  Sum<T> sum_s, sum_t;
  sweep<T>(row.classes, [&](int64_t c, int part, auto count) {
    const OverMean<T> logs = over_mean<T>(log_q_over_p(c, count));
    sum_s.parts[part] += load(row.q + c) * logs.q;
    sum_t.parts[part] += load(row.p + c) * logs.p;
  }, sum_s, sum_t);
  const T total_s = sum<T>(sum_s.total()) * of_s, total_t = sum<T>(sum_t.total()) * of_t;
  if (row.grad_s || row.grad_t) {
    const T factor = row.temperature * row.weight / T(2);
    sweep<T>(row.classes, [&](int64_t c, int, auto count) {
      const OverMean<T> logs = over_mean<T>(log_q_over_p(c, count));
      row.store_grads(c, count, load(row.q + c) * (of_s * factor) * (logs.q - total_s),
                      load(row.p + c) * (of_t * factor) * (logs.p - total_t));
    });
  }
  return (total_s + total_t) * row.temperature * row.temperature / T(2);
}

template <class S>
Compute<S> difference(const Row<S>& row, bool squared) {
  using T = Compute<S>;
  const T per_class = T(1) / T(row.classes), factor = per_class * row.weight;
  const Vec<T> one = broadcast(T(1));
  Sum<T> total;
  sweep<T>(row.classes, [&](int64_t c, int part, auto count) {
    __builtin_prefetch(row.s + c + row.ahead_s);
    __builtin_prefetch(row.t + c + row.ahead_t);
    const Vec<T> d = load_wide(row.s + c, count) - load_wide(row.t + c, count);
    total.parts[part] += squared ? d * d : maximum<T>(-d, d);
    if (!row.grad_s && !row.grad_t) return;
    const Vec<T> sign = d > T(0) ? one : (d < T(0) ? -one : Vec<T>{}), grad = (squared ? d * T(2) : sign) * factor;
    row.store_grads(c, count, grad, -grad);
  }, total);
  return sum<T>(total.total()) * per_class;
}

template <class S>
Compute<S> row_loss(const Row<S>& row, KDKind kind) {
  switch (kind) {
    case KDKind::kl: return kl<false>(row);
    case KDKind::reverse_kl: return kl<true>(row);
    case KDKind::js: return js(row);
    case KDKind::l1: return difference(row, false);
    default: return difference(row, true);
  }
}

template <class S>
void run(const KDLoss& args, ParallelFor parallel_for) {
  using T = Compute<S>;
  Shares rows(args.rows, 8192 / (args.classes + 1) + 1);  // some ten microseconds of work for a thread
  rows.among(parallel_for, [&](Shares::Walk walk) {
    Workspace memory;
    Row<S> row{};
    row.classes = args.classes;
    row.temperature = T(args.temperature);
    row.weight = T(args.weight);
    row.ahead_s = args.student_stride < kFarthest ? args.student_stride : kFarthest;
    row.ahead_t = args.teacher_stride < kFarthest ? args.teacher_stride : kFarthest;
    row.q = memory.take<T>(pad<T>(args.classes));
    row.p = memory.take<T>(pad<T>(args.classes));
    for (Range mine = walk.take(); !mine.empty(); mine = walk.take()) {
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        row.s = static_cast<const S*>(args.student) + i * args.student_stride;
        row.t = static_cast<const S*>(args.teacher) + i * args.teacher_stride;
        if (args.student_grad) row.grad_s = static_cast<S*>(args.student_grad) + i * args.classes;
        if (args.teacher_grad) row.grad_t = static_cast<S*>(args.teacher_grad) + i * args.classes;
        static_cast<T*>(args.loss)[i] = row_loss(row, args.kind);
      }
    }
  });
}

}  // namespace

void kd_loss(const KDLoss& args, ParallelFor parallel_for) {
  switch (args.dtype) {
    case DType::float32: return run<float>(args, parallel_for);
    case DType::bfloat16: return run<bf16>(args, parallel_for);
    case DType::float16: return run<f16>(args, parallel_for);
    case DType::float64: return run<double>(args, parallel_for);
  }
}

}  // namespace vitkd::cpu::VITKD_ISA
