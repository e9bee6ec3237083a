// C (+)= A B for the small matrices of one attention head, register-blocked.
//
// A(i, k) = a[i * a_row + k * a_col], so a transposed A costs nothing; B and C have contiguous rows, whose number of
// columns is a multiple of the vector width. One tile keeps rows x vectors accumulators in registers and streams B past
// them: per step of k it loads its vectors of B, broadcasts its rows of A and does rows * vectors multiply-adds.
#pragma once

#include "ahead.h"
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

// What becomes of a sum of products once it is complete.
template <class T>
struct Finish {
  const T* row_factors = nullptr;
  T factor = T(1);        // where rows have none of their own
  bool narrowed = false;  // to bfloat16
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
  Finish<T> finish = {};  // narrowed only if the product has one section and does not accumulate
};

#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers: 24 accumulators, up to 4 of B, a broadcast
constexpr bool kManyRegisters = true;
constexpr int kVectors = 4;
constexpr int kRows[kVectors + 1] = {0, 12, 12, 8, 6};  // of a tile so many vectors wide
#else  // 16 registers: 12 accumulators, up to 3 of B, a broadcast
constexpr bool kManyRegisters = false;
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
  T* const c = g.c + row * c_row + column;
  const int64_t work = R * V * lanes * kSteps<In> * g.depth;
  if constexpr (!kManyRegisters) g.ahead->some(work);
  Vec<T> sums[R][V];
  VITKD_UNROLL
  for (int r = 0; r < R; ++r) {
    VITKD_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = Vec<T>{};
  }
  const auto step = [&] {
    Vec<T> bs[V];
    VITKD_UNROLL
    for (int v = 0; v < V; ++v) bs[v] = load(reinterpret_cast<const T*>(b) + v * lanes);
    VITKD_UNROLL
    for (int r = 0; r < R; ++r) {
      VITKD_UNROLL
      for (int v = 0; v < V; ++v) multiply_add<In>(sums[r][v], a[r * a_row], bs[v]);
    }
    a += a_col;
    b += b_row;
  };
  if constexpr (kManyRegisters) {
    g.ahead->begin(work);
    for (int64_t left = g.depth; left > 0;) {
      Ahead::Lines lines = g.ahead->take(left);
      left -= lines.steps;
      for (; lines.steps > 0; --lines.steps, lines.at += lines.stride) {
        __builtin_prefetch(lines.at, 0, 3);
        step();
      }
    }
  } else {
    for (int64_t k = g.depth; k > 0; --k) step();
  }
  if (g.accumulate) {
    VITKD_UNROLL
    for (int r = 0; r < R; ++r) {
      VITKD_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += load(c + r * c_row + v * lanes);
    }
  }
  const Finish<T>& finish = g.finish;
  if (finish.row_factors != nullptr || finish.factor != T(1)) {
    VITKD_UNROLL
    for (int r = 0; r < R; ++r) {
      const T factor = finish.row_factors != nullptr ? finish.row_factors[row + r] : finish.factor;
      VITKD_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] *= factor;
    }
  }
  if constexpr (std::is_same_v<In, Pair>) {
    if (finish.narrowed) {
      bf16* narrow = reinterpret_cast<bf16*>(g.c) + row * c_row + column;
      VITKD_UNROLL
      for (int r = 0; r < R; ++r) {
        VITKD_UNROLL
        for (int v = 0; v < V; ++v) store_narrow(narrow + r * c_row + v * lanes, sums[r][v]);
      }
      return;
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
  int64_t row = 0;
  for (; row + R <= g.rows; row += R) gemm_tile<In, R, V>(g, row, column);
  if (row < g.rows) gemm_rest<In, R - 1, V>(g, row, column);
}

// In sections of about 64 steps: one running sum over 577 terms has 1.5 times the error of torch's product in float32,
// sections have 0.9 times; a panel of B takes some 16 KB. As few as will do, for each reads and writes all of C. Pairs
// are rounded more than that: theirs are as long as the first-level cache allows.
template <class In>
constexpr int64_t kSection = kSteps<In> == 1 ? 64 : 80;

template <class In>
int64_t sections_of(int64_t depth) {
  return depth < kSection<In> ? 1 : (depth + kSection<In> / 2) / kSection<In>;
}

template <class In>
void gemm(Gemm<In> g) {
  constexpr int64_t lanes = kLanes<SumOf<In>>;
  const auto finish = g.finish;
  for (int64_t left = g.depth, sections = sections_of<In>(left); sections > 0; --sections) {
    g.depth = (left + sections - 1) / sections;
    g.finish = sections == 1 ? finish : Finish<SumOf<In>>{};
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
