// Distance between attention maps on the CPU, and its gradients. A task owns the heads that are compared together: one
// of the student's and one of the teacher's, or all of an image where their means are. As in attention.cpp all keys
// meet a strip of queries, whose scores have one column per query; the distance and the gradients of the scores go down
// the columns, and only strips of maps ever exist.
#include "softmax.h"

#include "../kernels.h"
#include "shares.h"
#include "workspace.h"

namespace vitkd::cpu::VITKD_ISA {

namespace {

constexpr int64_t kStripElements = 192 << 10;  // of the scores of all heads: 768 KB of floats
constexpr int64_t kStripLanes = 48;
constexpr double kDeepest = 100;  // bits below the largest power that one may be, lest a weight be subnormal

// Of positive numbers that are not subnormal: the exponent, and 2 atanh((m - 1) / (m + 1)) of what is left, in
// [sqrt(1/2), sqrt(2)), by its series. NaN stays NaN.
template <class T>
inline Vec<T> log2(Vec<T> x) {
  using Int = typename Lanes<T>::Int;
  constexpr bool narrow = sizeof(T) == 4;
  constexpr int64_t root = narrow ? 0x3f3504f3 : 0x3fe6a09e667f3bcd;
  constexpr int mantissa = narrow ? 23 : 52, terms = narrow ? 5 : 11;
  const Int exponent = ((Int)x - static_cast<decltype(Int{}[0] + 0)>(root)) >> mantissa;
  const Vec<T> m = (Vec<T>)((Int)x - (exponent << mantissa));
  const Vec<T> y = (m - T(1)) / (m + T(1)), y2 = y * y;
  Vec<T> p = broadcast(T(1) / T(2 * terms - 1));
  VITKD_UNROLL
  for (int k = terms - 2; k >= 0; --k) p = p * y2 + T(1) / T(2 * k + 1);
  const Vec<T> result = __builtin_convertvector(exponent, Vec<T>) + p * y * T(2 * kLog2E);
  return x != x ? x : result;
}

// The mean of some heads' weights at one key, for a vector of queries.
template <class T>
struct Mean {
  Vec<T> log;  // base 2
  Vec<T> value;
  Vec<T> inverse;  // 1 over the sum of all heads' weights, each over `largest`
  Vec<T> largest;  // of them, or 1
};

// One side of a task: the maps of `heads` heads, the first of which is `first`. In a strip's scores each head has its
// matrix, (tokens, columns); `average` says whether they are compared as one.
template <class T, bool average>
class Maps {
 public:
  Maps(const AttentionSide& side, int64_t tokens, int64_t image, int64_t first, int64_t heads, int64_t strip,
       Workspace& memory)
      : side_(side), tokens_(tokens), image_(image), first_(first), heads_(heads), width_(pad<T>(side.head_dim)) {
    keys_ = memory.take<T>(heads * tokens * width_);
    scores_ = memory.take<T>(heads * tokens * strip);
    logs_ = memory.take<T>(heads * strip);
    across_ = memory.take<T>(side.head_dim * strip);
    for (int64_t h = 0; h < heads; ++h) {
      rows(1, 0, h, [&](const auto* keys) {
        pack_rows(keys, side.stride[1], tokens, side.head_dim, keys_ + h * tokens * width_, width_);
      });
    }
    if (side.grad == nullptr) return;
    grads_ = memory.take<T>(heads * tokens * strip);
    grad_keys_ = memory.take<T>(heads * tokens * width_);
    queries_ = memory.take<T>(strip * width_);
    grad_queries_ = memory.take<T>(strip * width_);
    sums_ = memory.take<Sum<T>>(heads);
  }

  bool wanted() const { return side_.grad != nullptr; }

  // The scores of queries `first` and on, in bits below each column's largest, and the log of the sum of their powers.
  // Only differences are scaled, and the log stays by itself: the largest may be large, which neither is. Where means
  // are compared and no power is too small for it, the powers themselves take the scores' place, and 1 / sum the log's.
  void score(int64_t first, int64_t count, int64_t columns) {
    columns_ = columns;
    powers_ = average;
    if (!soften(first, count)) {
      powers_ = false;
      soften(first, count);
    }
  }

  // Before the columns from `n` on.
  void begin(int64_t n) {
    n_ = n;
    if (!wanted()) return;
    for (int64_t h = 0; h < heads_; ++h) sums_[h] = Sum<T>();
  }

  // The weights to compare at `key`; of several heads, each one's over `largest` takes the place of its score.
  Mean<T> mean(int64_t key) {
    T* at = scores_ + key * columns_ + n_;
    const T* log = logs_ + n_;
    if constexpr (!average) {
      const Vec<T> own = load(at) - load(log), weight = exp2(own);
      return {own, weight, broadcast(T(1)), weight};
    }
    const int64_t step = tokens_ * columns_;
    Vec<T> sum = {};
    if (powers_) {
      for (int64_t h = 0; h < heads_; ++h) {
        const Vec<T> weight = load(at + h * step) * load(log + h * columns_);
        store(at + h * step, weight);
        sum += weight;
      }
      const Vec<T> value = sum / T(heads_);
      return {log2<T>(value), value, T(1) / sum, broadcast(T(1))};
    }
    Vec<T> largest = load(at) - load(log);
    for (int64_t h = 1; h < heads_; ++h) {
      largest = maximum<T>(load(at + h * step) - load(log + h * columns_), largest);
    }
    for (int64_t h = 0; h < heads_; ++h) {
      const Vec<T> weight = exp2(load(at + h * step) - load(log + h * columns_) - largest);
      store(at + h * step, weight);
      sum += weight;
    }
    const Vec<T> share = sum / T(heads_), scale = exp2(largest);
    return {largest + log2<T>(share), share * scale, T(1) / sum, scale};
  }

  // From the gradient of the mean's log at `key` that of each head's, and each head's weight in place of its score.
  void differentiate(int64_t key, const Mean<T>& mean, Vec<T> grad, int part) {
    const int64_t at = key * columns_ + n_;
    if constexpr (!average) {
      store(scores_ + at, mean.value);
      store(grads_ + at, grad);
      sums_->parts[part] += grad;
      return;
    }
    const Vec<T> share = grad * mean.inverse;
    for (int64_t h = 0, i = at; h < heads_; ++h, i += tokens_ * columns_) {
      const Vec<T> weight = load(scores_ + i), own = weight * share;
      if (!powers_) store(scores_ + i, weight * mean.largest);
      store(grads_ + i, own);
      sums_[h].parts[part] += own;
    }
  }

  void end_section() {
    if (!wanted()) return;
    for (int64_t h = 0; h < heads_; ++h) sums_[h].end_section();
  }

  // Gradients of the logs become those of the scores: less each column's sum, shared out by weight.
  void end() {
    if (!wanted()) return;
    for (int64_t h = 0; h < heads_; ++h) {
      const Vec<T> sum = sums_[h].total();
      T* grad = grads_ + h * tokens_ * columns_ + n_;
      const T* weight = scores_ + (grad - grads_);
      for (int64_t key = 0; key < tokens_; ++key, grad += columns_, weight += columns_) {
        store(grad, load(grad) - load(weight) * sum);
      }
    }
  }

  // What the strip's queries and, from them, all keys get.
  void spread(int64_t first, int64_t count) {
    if (!wanted()) return;
    for (int64_t h = 0; h < heads_; ++h) {
      const T* grads = grads_ + h * tokens_ * columns_;
      rows(0, first, h, [&](const auto* queries) {
        pack_rows(queries, side_.stride[1], count, side_.head_dim, queries_, width_);
      });
      gemm<T>({count, width_, tokens_, grads, 1, columns_, keys_ + h * tokens_ * width_, width_, grad_queries_, width_,
               false, &ahead_});
      gemm<T>({tokens_, width_, count, grads, columns_, 1, queries_, width_, grad_keys_ + h * tokens_ * width_, width_,
               first > 0, &ahead_});
      write(grad_queries_, count, 0, first, h);
    }
  }

  void finish() {
    if (!wanted()) return;
    for (int64_t h = 0; h < heads_; ++h) write(grad_keys_ + h * tokens_ * width_, tokens_, 1, 0, h);
  }

 private:
  // Whether the scores became what they are to be; powers may be too small.
  bool soften(int64_t first, int64_t count) {
    Vec<T> depth = {};
    for (int64_t h = 0; h < heads_; ++h) {
      rows(0, first, h, [&](const auto* queries) {
        pack_across(queries, side_.stride[1], count, side_.head_dim, T(side_.scale), across_, columns_);
      });
      T* const scores = scores_ + h * tokens_ * columns_;
      gemm<T>({tokens_, columns_, side_.head_dim, keys_ + h * tokens_ * width_, width_, 1, across_, columns_, scores,
               columns_, false, &ahead_});
      for (int64_t n = 0; n < columns_; n += kLanes<T>) {
        const Vec<T> peak = column_max(scores + n, tokens_, columns_);
        Sum<T> sum;
        by_fours(tokens_, [&](int64_t key, auto some) {
          constexpr int rows = some;
          VITKD_UNROLL
          for (int i = 0; i < rows; ++i) {
            T* const score = scores + (key + i) * columns_ + n;
            const Vec<T> below = (load(score) - peak) * T(kLog2E), power = exp2(below);
            depth = maximum<T>(-below, depth);
            store(score, powers_ ? power : below);
            sum.parts[i] += power;
          }
        }, sum);
        store(logs_ + h * columns_ + n, powers_ ? T(1) / sum.total() : log2<T>(sum.total()));
      }
    }
    return !powers_ || max<T>(depth) < T(kDeepest);
  }

  // Query (slot 0) or key (1) rows of a head from token `token` on.
  template <class Work>
  void rows(int64_t slot, int64_t token, int64_t head, Work work) const {
    const auto& stride = side_.stride;
    const int64_t at = image_ * stride[0] + token * stride[1] + slot * stride[2] + (first_ + head) * stride[3];
    with_rows<T>(side_.dtype, side_.qk, at, work);
  }

  void write(const T* from, int64_t count, int64_t slot, int64_t token, int64_t head) const {
    const int64_t channels = side_.heads * side_.head_dim;
    T* to = static_cast<T*>(side_.grad) + ((image_ * tokens_ + token) * 2 + slot) * channels;
    to += (first_ + head) * side_.head_dim;
    for (int64_t i = 0; i < count; ++i) pack(from + i * width_, side_.head_dim, T(1), to + i * 2 * channels);
  }

  const AttentionSide& side_;
  const int64_t tokens_, image_, first_, heads_, width_;
  int64_t columns_ = 0, n_ = 0;
  bool powers_ = false;  // are where the scores were
  T *keys_, *scores_, *logs_, *across_;
  T *grads_ = nullptr, *grad_keys_ = nullptr, *queries_ = nullptr, *grad_queries_ = nullptr;
  Sum<T>* sums_ = nullptr;
  Ahead ahead_;  // of nothing: memory is a small part of the time
};

// The two sides' distance at one key and its gradients by the natural logs of both weights.
template <class T>
struct Distance {
  Vec<T> value, by_student, by_teacher;
};

template <class T, AttentionKDKind kind>
inline Distance<T> distance(const Mean<T>& student, const Mean<T>& teacher) {
  const Vec<T> q = student.value, p = teacher.value;
  if constexpr (kind == AttentionKDKind::mse) {
    const Vec<T> difference = p - q;
    return {difference * difference, difference * q * T(-2), difference * p * T(2)};
  } else {
    const Vec<T> value = p * ((teacher.log - student.log) * T(1 / kLog2E));
    return {value, -p, value};
  }
}

template <class T>
int64_t strip_columns(const AttentionKD& args, bool average) {
  const int64_t heads = average ? args.student.heads + args.teacher.heads : 2;
  const int64_t fit = kStripElements / (args.tokens * heads) / kLanes<T> * kLanes<T>;
  const int64_t most = fit < kLanes<T> ? kLanes<T> : fit < kStripLanes ? fit : kStripLanes, all = pad<T>(args.tokens);
  return all < most ? all : most;
}

template <class T, AttentionKDKind kind, bool average>
void compare(const AttentionKD& args, int64_t index, Workspace& memory) {
  const int64_t groups = average ? 1 : args.student.heads, image = index / groups, first = index % groups;
  const int64_t tokens = args.tokens, strip = strip_columns<T>(args, average);
  memory.rewind();
  Maps<T, average> student(args.student, tokens, image, first, average ? args.student.heads : 1, strip, memory);
  Maps<T, average> teacher(args.teacher, tokens, image, first, average ? args.teacher.heads : 1, strip, memory);
  const T share = T(1) / (T(tokens) * T(groups));
  const T student_share = share * T(args.student.scale), teacher_share = share * T(args.teacher.scale);
  double loss = 0;
  for (int64_t start = 0; start < tokens; start += strip) {
    const int64_t count = tokens - start < strip ? tokens - start : strip, columns = pad<T>(count);
    student.score(start, count, columns);
    teacher.score(start, count, columns);
    for (int64_t n = 0; n < columns; n += kLanes<T>) {
      student.begin(n);
      teacher.begin(n);
      Sum<T> total;
      by_fours(tokens, [&](int64_t key, auto some) {
        constexpr int rows = some;
        VITKD_UNROLL
        for (int i = 0; i < rows; ++i) {
          const Mean<T> q = student.mean(key + i), p = teacher.mean(key + i);
          const Distance<T> between = distance<T, kind>(q, p);
          total.parts[i] += between.value;
          if (student.wanted()) student.differentiate(key + i, q, between.by_student * student_share, i);
          if (teacher.wanted()) teacher.differentiate(key + i, p, between.by_teacher * teacher_share, i);
        }
      }, total, student, teacher);
      student.end();
      teacher.end();
      loss += sum<T>(first_lanes<T>(total.total(), count - n, T(0)));  // columns beyond the last query repeat it
    }
    student.spread(start, count);
    teacher.spread(start, count);
  }
  student.finish();
  teacher.finish();
  static_cast<T*>(args.loss)[index] = T(loss / double(tokens));
}

template <class T, AttentionKDKind kind, bool average>
void run(const AttentionKD& args, ParallelFor parallel_for) {
  const int64_t heads = args.student.heads + args.teacher.heads;
  const int64_t groups = average ? 1 : args.student.heads;
  const int64_t work = args.tokens * args.tokens * args.student.head_dim * (heads / groups);
  Shares tasks(args.batch * groups, work >= 65536 ? 1 : 65536 / (work + 1) + 1);
  tasks.among(parallel_for, [&](Shares::Walk walk) {
    Workspace memory;
    for (Range mine = walk.take(); !mine.empty(); mine = walk.take()) {
      for (int64_t i = mine.begin; i < mine.end; ++i) compare<T, kind, average>(args, i, memory);
    }
  });
}

template <class T>
void choose(const AttentionKD& args, ParallelFor parallel_for) {
  const bool average = args.average_heads;
  if (args.kind == AttentionKDKind::mse) {
    average ? run<T, AttentionKDKind::mse, true>(args, parallel_for)
            : run<T, AttentionKDKind::mse, false>(args, parallel_for);
  } else {
    average ? run<T, AttentionKDKind::kl, true>(args, parallel_for)
            : run<T, AttentionKDKind::kl, false>(args, parallel_for);
  }
}

}  // namespace

void attention_kd(const AttentionKD& args, ParallelFor parallel_for) {
  args.student.dtype == DType::float64 ? choose<double>(args, parallel_for) : choose<float>(args, parallel_for);
}

}  // namespace vitkd::cpu::VITKD_ISA
