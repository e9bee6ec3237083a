// How a head's attention is shared out among some keys, and the gradient of that, on the CPU. A task owns a head. As in
// attention.cpp all keys meet a strip of queries, whose scores have one column per query; a key's share is summed along
// its row, lane by lane, and no map outlives its strip.
#include "softmax.h"

#include "../kernels.h"
#include "shares.h"
#include "workspace.h"

namespace vitkd::cpu::VITKD_ISA {

namespace {

constexpr int64_t kStripElements = 96 << 10;  // of scores: 384 KB of floats
constexpr int64_t kStripLanes = 48;

template <class T>
class Head {
 public:
  Head(const AttentionShares& args, int64_t index, Workspace& memory)
      : args_(args), index_(index), keys_count_(args.key_count), width_(pad<T>(args.head_dim)) {
    const int64_t fit = kStripElements / keys_count_ / kLanes<T> * kLanes<T>, all = pad<T>(args.query_count);
    const int64_t most = fit < kLanes<T> ? kLanes<T> : fit < kStripLanes ? fit : kStripLanes;
    strip_ = all < most ? all : most;
    memory.rewind();
    keys_ = memory.take<T>(keys_count_ * width_);
    queries_ = memory.take<T>(strip_ * width_);
    across_ = memory.take<T>(args.head_dim * strip_);
    scores_ = memory.take<T>(keys_count_ * strip_);
    rows_ = memory.take<T>(keys_count_ * kLanes<T>);
    gather(1, args.keys, keys_count_, keys_);
  }

  void forward() {
    clear(rows_, 0, keys_count_, kLanes<T>);
    strips([&](int64_t, int64_t count) {
      for (int64_t n = 0; n < columns_; n += kLanes<T>) {
        T* const powers = scores_ + n;
        const Vec<T> inverse = T(1) / exponentials(powers, [](Vec<T>, int64_t, int) {});
        const Vec<T> share = first_lanes<T>(inverse, count - n, T(0));  // columns past the last query repeat it
        for (int64_t key = 0; key < keys_count_; ++key) {
          T* const row = rows_ + key * kLanes<T>;
          store(row, load(row) + load(powers + key * columns_) * share);
        }
      }
    });
    T* const shares = static_cast<T*>(args_.shares) + index_ * keys_count_;
    for (int64_t key = 0; key < keys_count_; ++key) {
      shares[key] = sum<T>(load(rows_ + key * kLanes<T>)) / T(args_.query_count);
    }
  }

  void backward(Workspace& memory) {
    T* const grad_queries = memory.take<T>(strip_ * width_);
    T* const grad_keys = memory.take<T>(keys_count_ * width_);
    T* const of_tokens[] = {memory.take<T>(args_.tokens * width_), memory.take<T>(args_.tokens * width_)};
    for (T* grads : of_tokens) clear(grads, 0, args_.tokens, width_);
    const T* grad = static_cast<const T*>(args_.grad_shares) + index_ * keys_count_;
    for (int64_t key = 0; key < keys_count_; ++key) {
      store(rows_ + key * kLanes<T>, broadcast(grad[key] / T(args_.query_count)));
    }
    strips([&](int64_t first, int64_t count) {
      for (int64_t n = 0; n < columns_; n += kLanes<T>) {
        Sum<T> dot;
        T* const powers = scores_ + n;
        const auto add = [&](Vec<T> power, int64_t key, int part) {
          dot.parts[part] += power * load(rows_ + key * kLanes<T>);
        };
        const Vec<T> inverse = T(1) / exponentials(powers, add, dot);
        const Vec<T> mean = dot.total() * inverse, factor = inverse * T(args_.scale);
        for (int64_t key = 0; key < keys_count_; ++key) {
          T* const power = powers + key * columns_;
          store(power, load(power) * factor * (load(rows_ + key * kLanes<T>) - mean));
        }
      }
      gemm<T>({count, width_, keys_count_, scores_, 1, columns_, keys_, width_, grad_queries, width_, false, &ahead_});
      gemm<T>({keys_count_, width_, count, scores_, columns_, 1, queries_, width_, grad_keys, width_, first > 0,
               &ahead_});
      scatter(grad_queries, args_.queries + first, count, of_tokens[0]);
    });
    scatter(grad_keys, args_.keys, keys_count_, of_tokens[1]);
    for (int64_t slot = 0; slot < args_.slots; ++slot) write(slot, slot < 2 ? of_tokens[slot] : nullptr);
  }

 private:
  // work(first, count) on each strip of queries, whose scores lie there, `columns_` to a row.
  template <class Work>
  void strips(Work work) {
    for (int64_t first = 0; first < args_.query_count; first += strip_) {
      const int64_t left = args_.query_count - first, count = left < strip_ ? left : strip_;
      columns_ = pad<T>(count);
      gather(0, args_.queries + first, count, queries_);
      pack_across(queries_, width_, count, args_.head_dim, T(args_.scale), across_, columns_);
      gemm<T>({keys_count_, columns_, args_.head_dim, keys_, width_, 1, across_, columns_, scores_, columns_, false,
               &ahead_});
      work(first, count);
    }
  }

  // Scores of one vector of queries become powers, the largest of which is 1; returns their sums. `also` is told of
  // each power, its key and the part of a sum that it may add to.
  template <class Also, class... Sums>
  Vec<T> exponentials(T* scores, Also also, Sums&... sums) const {
    const Vec<T> peak = column_max(scores, keys_count_, columns_);
    Sum<T> total;
    by_fours(keys_count_, [&](int64_t key, auto some) {
      constexpr int rows = some;
      VITKD_UNROLL
      for (int i = 0; i < rows; ++i) {
        T* const score = scores + (key + i) * columns_;
        const Vec<T> power = exp2((load(score) - peak) * T(kLog2E));
        store(score, power);
        total.parts[i] += power;
        also(power, key + i, i);
      }
    }, total, sums...);
    return total.total();
  }

  int64_t channels() const { return args_.heads * args_.head_dim; }
  int64_t image() const { return index_ / args_.heads; }
  int64_t head() const { return index_ % args_.heads; }

  // What queries (slot 0) or keys (1) of these tokens are.
  void gather(int64_t slot, const int64_t* tokens, int64_t count, T* rows) const {
    const auto& stride = args_.stride;
    const int64_t at = image() * stride[0] + slot * stride[2] + head() * stride[3];
    with_rows<T>(args_.dtype, args_.qk, at, [&](const auto* from) {
      for (int64_t i = 0; i < count; ++i) {
        pack_rows(from + tokens[i] * stride[1], 0, 1, args_.head_dim, rows + i * width_, width_);
      }
    });
  }

  // Added up, for a token may be asked for more than once.
  void scatter(const T* rows, const int64_t* tokens, int64_t count, T* of_tokens) const {
    for (int64_t i = 0; i < count; ++i, rows += width_) {
      T* const to = of_tokens + tokens[i] * width_;
      for (int64_t d = 0; d < width_; d += kLanes<T>) store(to + d, load(to + d) + load(rows + d));
    }
  }

  // Nothing where `of_tokens` is null.
  void write(int64_t slot, const T* of_tokens) const {
    const int64_t at = (image() * args_.tokens * args_.slots + slot) * channels() + head() * args_.head_dim;
    with_rows<T>(args_.dtype, args_.grad_qk, at, [&](auto* to) {
      for (int64_t token = 0; token < args_.tokens; ++token, to += args_.slots * channels()) {
        if (of_tokens == nullptr) __builtin_memset(to, 0, args_.head_dim * sizeof(*to));
        else pack(of_tokens + token * width_, args_.head_dim, T(1), to);
      }
    });
  }

  const AttentionShares& args_;
  const int64_t index_, keys_count_, width_;
  int64_t strip_, columns_ = 0;
  T *keys_, *queries_, *across_, *scores_;
  T* rows_;  // a vector to each key: forward its share by lanes, backward its gradient
  Ahead ahead_;  // of nothing: memory is a small part of the time
};

template <class T>
void run(const AttentionShares& args, ParallelFor parallel_for) {
  const int64_t work = args.query_count * args.key_count * args.head_dim;
  Shares tasks(args.batch * args.heads, work >= 65536 ? 1 : 65536 / (work + 1) + 1);
  tasks.among(parallel_for, [&](Shares::Walk walk) {
    Workspace memory;
    for (Range mine = walk.take(); !mine.empty(); mine = walk.take()) {
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        Head<T> head(args, i, memory);
        args.grad_shares == nullptr ? head.forward() : head.backward(memory);
      }
    }
  });
}

}  // namespace

void attention_shares(const AttentionShares& args, ParallelFor parallel_for) {
  args.dtype == DType::float64 ? run<double>(args, parallel_for) : run<float>(args, parallel_for);
}

}  // namespace vitkd::cpu::VITKD_ISA
