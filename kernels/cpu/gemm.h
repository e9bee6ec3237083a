// C (+)= A B for the small matrices of one attention head, register-blocked.
//
// A(i, k) = a[i * a_row + k * a_col], so a transposed A costs nothing; B and C have contiguous rows, whose number of
// columns is a multiple of the vector width. One tile keeps rows x vectors accumulators in registers and streams B past
// them: per step of k it loads its vectors of B, broadcasts its rows of A and does rows * vectors multiply-adds.
#pragma once

#include "simd.h"

namespace vitkd::cpu::VITKD_ISA {

// Two bfloat16, neighbours in the direction that a product sums over: the first in the low half.
struct Pair {
  uint32_t bits;
};

template <class In>
constexpr int64_t kSteps = 1;  // how many terms of a sum one element of In holds
template <>
constexpr int64_t kSteps<Pair> = 2;

template <class In>
struct SumType {
  using type = In;
};
template <>
struct SumType<Pair> {
  using type = float;
};
template <class In>
using SumOf = typename SumType<In>::type;

template <class In>
inline void multiply_add(Vec<SumOf<In>>& sum, In a, Vec<SumOf<In>> b) {
  if constexpr (std::is_same_v<In, Pair>) {
#if defined(__AVX512BF16__)
    const __m512i pairs = _mm512_set1_epi32(static_cast<int>(a.bits));
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)b);
#endif
  } else {
    sum += a * b;
  }
}

// What the next head will read, and what backward writes of this one, asked for while this one computes: rows that lie
// so far apart that no hardware prefetcher follows them. They are asked for evenly, as the products go on: in a burst,
// those that a core has no buffers left to wait for would hold up what the products load.
class Ahead {
 public:
  // `work` multiply-adds, at least, will be done meanwhile.
  explicit Ahead(int64_t work) : work_(static_cast<float>(work)) {}

  // Rows of `width` elements, `stride` apart.
  template <class S>
  void add(const S* rows, int64_t stride, int64_t count, int64_t width) {
    constexpr int64_t size = sizeof(S);
    matrices_[count_++] = {reinterpret_cast<const char*>(rows), stride * size, count, width * size};
    rows_ += static_cast<float>(count);
    pace_ = rows_ / work_;
  }

  // The share of so much work; called once per tile.
  void some(int64_t work) {
    for (due_ += pace_ * static_cast<float>(work); due_ >= 1 && next_ < count_; due_ -= 1) {
      Matrix& m = matrices_[next_];
      for (int64_t at = 0; at < m.bytes; at += 64) __builtin_prefetch(m.rows + at, 0, 3);
      m.rows += m.stride;
      if (--m.count == 0) ++next_;
    }
  }

 private:
  struct Matrix {
    const char* rows;
    int64_t stride, count, bytes;
  };
  static constexpr int kMatrices = 7;  // backward: three gradients; query, key, value and the output's gradient
  Matrix matrices_[kMatrices];
  int count_ = 0, next_ = 0;
  float rows_ = 0, work_, pace_ = 0, due_ = 0;
};

template <class In>
struct Gemm {
  using T = SumOf<In>;
  int64_t rows, columns, depth;
  const In* a;
  int64_t a_row, a_col;
  const In* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  bool accumulate;
  Ahead* ahead;
  const T* row_factor = nullptr;  // what each row of the result is multiplied by
};

#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers: 24 accumulators, up to 4 of B, a broadcast
constexpr int kVectors = 4;
constexpr int kRows[kVectors + 1] = {0, 12, 12, 8, 6};  // of a tile so many vectors wide
#else  // 16 registers: 12 accumulators, up to 3 of B, a broadcast
constexpr int kVectors = 3;
constexpr int kRows[kVectors + 1] = {0, 12, 6, 4};
#endif

template <class In, int R, int V>
void gemm_tile(const Gemm<In>& g, int64_t row, int64_t column) {
  using T = SumOf<In>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t a_row = g.a_row, a_col = g.a_col, b_row = g.b_row, c_row = g.c_row;  // no store below changes them
  const In* a = g.a + row * a_row;
  const In* b = g.b + column;
  T* c = g.c + row * c_row + column;
  Vec<T> sums[R][V];
  VITKD_UNROLL
  for (int r = 0; r < R; ++r) {
    VITKD_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = Vec<T>{};
  }
  for (int64_t k = g.depth; k > 0; --k, a += a_col, b += b_row) {
    Vec<T> bs[V];
    VITKD_UNROLL
    for (int v = 0; v < V; ++v) bs[v] = load(reinterpret_cast<const T*>(b) + v * lanes);
    VITKD_UNROLL
    for (int r = 0; r < R; ++r) {
      VITKD_UNROLL
      for (int v = 0; v < V; ++v) multiply_add<In>(sums[r][v], a[r * a_row], bs[v]);
    }
  }
  if (g.accumulate) {
    VITKD_UNROLL
    for (int r = 0; r < R; ++r) {
      VITKD_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += load(c + r * c_row + v * lanes);
    }
  }
  if (g.row_factor != nullptr) {
    VITKD_UNROLL
    for (int r = 0; r < R; ++r) {
      VITKD_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] *= g.row_factor[row + r];
    }
  }
  VITKD_UNROLL
  for (int r = 0; r < R; ++r) {
    VITKD_UNROLL
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * lanes, sums[r][v]);
  }
}

template <class In, int R, int V>
void gemm_rest(const Gemm<In>& g, int64_t row, int64_t column) {
  if (g.rows - row == R) return gemm_tile<In, R, V>(g, row, column);
  if constexpr (R > 1) gemm_rest<In, R - 1, V>(g, row, column);
}

// The panel of B under V vectors stays in the first-level cache while all rows of A pass over it.
template <class In, int V>
void gemm_panel(const Gemm<In>& g, int64_t column, int vectors) {
  if (vectors < V) {
    if constexpr (V > 1) gemm_panel<In, V - 1>(g, column, vectors);
    return;
  }
  constexpr int R = kRows[V];
  const auto ask_ahead = [&](int64_t rows) { g.ahead->some(rows * V * kLanes<SumOf<In>> * g.depth * kSteps<In>); };
  int64_t row = 0;
  for (; row + R <= g.rows; row += R) {
    ask_ahead(R);
    gemm_tile<In, R, V>(g, row, column);
  }
  if (row == g.rows) return;
  ask_ahead(g.rows - row);
  gemm_rest<In, R - 1, V>(g, row, column);
}

// In panels of about 64 terms: one running sum over 577 of them has 1.5 times the error of torch's product in float32,
// panels have 0.9 times. A panel of B takes some 16 KB. As few as will do, for each reads and writes all of C.
template <class In>
void gemm(Gemm<In> g) {
  constexpr int64_t lanes = kLanes<SumOf<In>>;
  const auto* const row_factor = g.row_factor;
  for (int64_t left = g.depth, sections = left < 64 ? 1 : (left + 32) / 64; sections > 0; --sections) {
    g.depth = (left + sections - 1) / sections;
    g.row_factor = sections == 1 ? row_factor : nullptr;
    for (int64_t vectors = g.columns / lanes, column = 0; vectors > 0;) {
      const int64_t panels = (vectors + kVectors - 1) / kVectors, width = (vectors + panels - 1) / panels;
      gemm_panel<In, kVectors>(g, column, static_cast<int>(width));
      column += width * lanes;
      vectors -= width;
    }
    g.a += g.depth * g.a_col;
    g.b += g.depth * g.b_row;
    left -= g.depth;
    g.accumulate = true;
  }
}

}  // namespace vitkd::cpu::VITKD_ISA
