// Queries that would leave most of a vector empty, as the class token does after 16, 64 or 256 patches. Each meets the
// keys by itself, with keys in the lanes instead of queries; what comes of it goes into its column of the strip.
#pragma once

#include "pack.h"

namespace vitkd::cpu::VITKD_ISA {

// How many of the last queries they are. A vector of queries takes the work of some four of them.
template <class In>
int64_t lone_queries(int64_t tokens) {
  constexpr int64_t lanes = kLanes<SumOf<In>>;
  const int64_t rest = tokens % lanes;
  return tokens > lanes && 4 * rest <= lanes ? rest : 0;
}

// On tiles another vector of queries costs a product little: there a lone one's scores are taken from its column.
template <class In>
constexpr bool kScoresInColumn = kTileOf<In> > 1;

template <class In>
inline void multiply_add_lanes(Vec<SumOf<In>>& sum, Vec<SumOf<In>> a, Vec<SumOf<In>> b) {
  if constexpr (std::is_same_v<In, Pair>) {
#if defined(__AVX512BF16__)
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
  } else {
    sum += a * b;
  }
}

// A vector of a row, of which only `count` elements may be touched, unless the row was packed, as pairs always are.
template <class In>
inline Vec<SumOf<In>> load_rest(const In* p, int64_t count) {
  if constexpr (std::is_same_v<In, Pair>) return load(reinterpret_cast<const float*>(p));
  else return load_wide(p, count);
}

// out[n] = row · rows[n], a vector of n at a time; those past the last repeat it.
template <class In>
void dots(const In* row, const Operand<In>& rows, int64_t count, int64_t depth, SumOf<In>* out) {
  using T = SumOf<In>;
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t n = 0; n < count; n += lanes) {
    const In* other[lanes];
    Vec<T> sums[lanes];
    VITKD_UNROLL
    for (int64_t i = 0; i < lanes; ++i) {
      other[i] = rows.rows + (n + i < count ? n + i : count - 1) * rows.stride;
      sums[i] = Vec<T>{};
    }
    int64_t d = 0;
    for (; d + lanes <= depth; d += lanes) {
      const Vec<T> mine = load(reinterpret_cast<const T*>(row + d));
      VITKD_UNROLL
      for (int64_t i = 0; i < lanes; ++i) {
        multiply_add_lanes<In>(sums[i], mine, load(reinterpret_cast<const T*>(other[i] + d)));
      }
    }
    if (d < depth) {
      const Vec<T> mine = load(reinterpret_cast<const T*>(row + d));
      for (int64_t i = 0; i < lanes; ++i) multiply_add_lanes<In>(sums[i], mine, load_rest(other[i] + d, depth - d));
    }
    transpose<T>(sums);
    VITKD_UNROLL
    for (int64_t half = lanes / 2; half > 0; half /= 2) {
      VITKD_UNROLL
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    store(out + n, sums[0]);
  }
}

// One row that multiplies others, as pack_across packs it: its last vector is filled up with zeros.
template <class S, class In>
void pack_lone(const S* in, int64_t head_dim, SumOf<In> scale, In* out) {
  using T = SumOf<In>;
  constexpr int64_t taken = kLanes<T> * kSteps<In>;
  for (int64_t d = 0; d < head_dim; d += taken) {
    store_operand(out + d / kSteps<In>, scaled<In>(load_operand<S, In>(in + d, head_dim - d), scale));
  }
}

template <class T>
void column_to_row(const T* column, int64_t stride, int64_t tokens, T* row) {
  for (int64_t n = 0; n < pad<T>(tokens); ++n) row[n] = column[(n < tokens ? n : tokens - 1) * stride];
}

// Lone rows of one head, queries or their output's gradients.
template <class In>
struct Lone {
  using T = SumOf<In>;
  int64_t tokens, head_dim;
  In* room;  // for one row
  Ahead* ahead;

  // out[n] = scale * row · rows[n], which on tiles the strip's `column` has already.
  template <class S>
  void meet(const S* row, T scale, const Operand<In>& rows, const T* column, int64_t stride, T* out) const {
    if constexpr (kScoresInColumn<In>) {
      column_to_row(column, stride, tokens, out);
    } else {
      ahead->some(tokens * head_dim);
      pack_lone(row, head_dim, scale, room);
      dots(room, rows, tokens, steps<In>(head_dim), out);
    }
  }
};

template <class T>
void row_to_column(const T* row, int64_t count, T* column, int64_t stride) {
  for (int64_t n = 0; n < count; ++n) column[n * stride] = row[n];
}

template <class T>
T row_max(const T* scores, int64_t tokens) {
  Vec<T> most = load(scores);
  for (int64_t n = kLanes<T>; n < tokens; n += kLanes<T>) most = maximum<T>(load(scores + n), most);
  return max<T>(most);
}

// The scores of a row become exp2(factor * (score - max)), and 0 past the last. Returns their sum.
template <bool coarse, class T>
T exponentials_of_row(T* scores, int64_t tokens, T factor) {
  const T peak = row_max(scores, tokens) * factor;
  Vec<T> total{};
  for (int64_t n = 0; n < tokens; n += kLanes<T>) {
    const Vec<T> e = first_lanes<T>(exp2<coarse>(load(scores + n) * factor - peak), tokens - n, T(0));
    store(scores + n, e);
    total += e;
  }
  return sum<T>(total);
}

// The scores and dP of a row become P and scale * dS, which is 0 past the last.
template <bool coarse, class T>
void softmax_backward_of_row(T* scores, T* grads, int64_t tokens, T factor, T scale) {
  const T inverse = T(1) / exponentials_of_row<coarse>(scores, tokens, factor);
  Vec<T> total{};
  for (int64_t n = 0; n < tokens; n += kLanes<T>) {
    total += first_lanes<T>(load(scores + n) * load(grads + n), tokens - n, T(0));
  }
  const T delta = sum<T>(total) * inverse;
  for (int64_t n = 0; n < tokens; n += kLanes<T>) {
    const Vec<T> e = load(scores + n), ds = e * (inverse * scale) * (load(grads + n) - delta);
    store(scores + n, e * inverse);
    store(grads + n, first_lanes<T>(ds, tokens - n, T(0)));
  }
}

// A row as elements of sums over keys; pairs narrow it in place.
template <class In, class T>
In* operand_row(T* row, [[maybe_unused]] int64_t tokens) {
  if constexpr (std::is_same_v<In, Pair>) {
    for (int64_t n = 0; n < tokens; n += kLanes<T>) store_narrow(reinterpret_cast<bf16*>(row) + n, load(row + n));
  }
  return reinterpret_cast<In*>(row);
}

}  // namespace vitkd::cpu::VITKD_ISA
