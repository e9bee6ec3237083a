// Lines of memory that will be wanted, asked for while something else is computed: rows that lie so far apart that no
// hardware prefetcher follows them. They are asked for evenly, as the products go on: in a burst, those that a core has
// no buffers left to wait for would hold up what the products load.
#pragma once

#include <cstdint>

namespace vitkd::cpu::VITKD_ISA {

class Ahead {
 public:
  // Rows of `width` elements, `stride` apart.
  template <class S>
  void add(const S* rows, int64_t stride, int64_t count, int64_t width) {
    constexpr int64_t size = sizeof(S);
    const int64_t lines = (width * size + kLine - 1) / kLine;
    matrices_[count_++] = {reinterpret_cast<const char*>(rows), stride * size, count, lines};
    lines_ += count * lines;
  }

  // While so many multiply-adds, at least, are done.
  void spread_over(int64_t work) { pace_ = static_cast<float>(lines_) / static_cast<float>(work); }

  // So much work begins: its share of the lines is due.
  void begin(int64_t work) { due_ += pace_ * static_cast<float>(work); }

  // Lines `stride` bytes apart, to be asked for one in a step of the work; or one that is there already, ever again.
  struct Lines {
    const char* at;
    int64_t stride, steps;
  };
  // For the next of so many steps, or for all.
  Lines take(int64_t steps) {
    const auto due = static_cast<int64_t>(due_);
    if (due == 0 || next_ == count_) return {reinterpret_cast<const char*>(this), 0, steps};
    const Matrix& m = matrices_[next_];
    const int64_t left = m.rows - row_, most = due < steps ? due : steps, count = left < most ? left : most;
    const Lines found = {m.begin + row_ * m.stride + line_ * kLine, m.stride, count};
    due_ -= static_cast<float>(count);
    row_ += count;
    if (row_ == m.rows) {
      row_ = 0;
      if (++line_ == m.lines) line_ = 0, ++next_;
    }
    return found;
  }

  // All that is due at once, where work has no steps or no registers left for this.
  void some(int64_t work) {
    for (begin(work); due_ >= 1 && next_ < count_;) {
      Lines lines = take(static_cast<int64_t>(due_));
      for (; lines.steps > 0; --lines.steps, lines.at += lines.stride) __builtin_prefetch(lines.at, 0, 3);
    }
  }

 private:
  struct Matrix {
    const char* begin;
    int64_t stride, rows, lines;
  };
  static constexpr int64_t kLine = 64;
  static constexpr int kMatrices = 7;  // backward: query, key, value, the output's gradient, three gradients
  Matrix matrices_[kMatrices];
  int count_ = 0, next_ = 0;
  int64_t row_ = 0, line_ = 0, lines_ = 0;
  float pace_ = 0, due_ = 0;
};

}  // namespace vitkd::cpu::VITKD_ISA
