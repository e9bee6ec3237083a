// Queries that would leave most of a vector empty, as the class token does after 16, 64 or 256 patches. Each meets the
// keys by itself, with keys in the lanes instead of queries; what comes of it goes into its column of the strip.
#pragma once

#include "pack.h"

namespace vitkd::cpu::VITKD_ISA {

// How many of the last queries they are. More than three, or than a quarter of a vector, take longer than the vector.
template <class In>
int64_t lone_queries(int64_t tokens) {
  constexpr int64_t lanes = kLanes<SumOf<In>>;
  const int64_t rest = tokens % lanes;
  return tokens > lanes && 4 * rest <= lanes && rest <= 3 ? rest : 0;
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

// A vector of a row, of which only `count` elements may be touched.
template <class In>
inline Vec<SumOf<In>> load_some(const In* p, int64_t count) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<In, Pair>) return load_pairs(reinterpret_cast<const bf16*>(p), 2 * count);
  else
#endif
    return load_wide(p, count);
}

// row · rows[i] for `number` rows, a vector of sums each.
template <int64_t number, class In>
inline void multiply_rows(const In* row, const In* rows, int64_t stride, int64_t depth, Vec<SumOf<In>>* sums) {
  using T = SumOf<In>;
  constexpr int64_t lanes = kLanes<T>;
  VITKD_UNROLL
  for (int64_t i = 0; i < number; ++i) sums[i] = Vec<T>{};
  int64_t d = 0;
  for (; d + lanes <= depth; d += lanes) {
    const Vec<T> mine = load(reinterpret_cast<const T*>(row + d));
    VITKD_UNROLL
    for (int64_t i = 0; i < number; ++i) {
      multiply_add_lanes<In>(sums[i], mine, load(reinterpret_cast<const T*>(rows + i * stride + d)));
    }
  }
  if (d == depth) return;
  const Vec<T> mine = load(reinterpret_cast<const T*>(row + d));
  for (int64_t i = 0; i < number; ++i) {
    multiply_add_lanes<In>(sums[i], mine, load_some(rows + i * stride + d, depth - d));
  }
}

// out[n] = row · rows[n], a vector of n at a time, and the rest, as many as there are lone queries, one by one. What
// fills up the last vector repeats one of its own.
template <class In>
void dots(const In* row, const Operand<In>& rows, int64_t count, int64_t depth, SumOf<In>* out) {
  using T = SumOf<In>;
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> sums[lanes];
  int64_t n = 0;
  for (; n + lanes <= count; n += lanes) {
    multiply_rows<lanes>(row, rows.rows + n * rows.stride, rows.stride, depth, sums);
    store(out + n, sums_of<T>(sums));
  }
  for (const int64_t first = n; n < count; ++n) {
    multiply_rows<1>(row, rows.rows + n * rows.stride, rows.stride, depth, sums);
    const T dot = sum<T>(sums[0]);
    if (n == first) store(out + n, broadcast(dot));
    else out[n] = dot;
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

// Weights that are rounded to bfloat16 need no better exponential.
template <class In>
inline Vec<SumOf<In>> exponential(Vec<SumOf<In>> x) {
  if constexpr (std::is_same_v<In, Pair>) return exp2_coarse(x);
  else return exp2(x);
}

// exp2(factor * (score - peak)), for floats without the factor, which their queries have taken. Nothing is scaled
// before the peak is taken off: of a large one, rounded, more would be left than an exponential can hold.
template <class In, class Peak>
inline Vec<SumOf<In>> weight_below(Vec<SumOf<In>> score, Peak peak, SumOf<In> factor) {
  if constexpr (kSteps<In> == 1) return exponential<In>(score - peak);
  else return exponential<In>((score - peak) * factor);
}

// The scores of a row become exp2(factor * (score - max)), and 0 past the last. Returns their sum.
template <class In, class T>
T exponentials_of_row(T* scores, int64_t tokens, T factor) {
  const T peak = row_max(scores, tokens);
  Vec<T> total{};
  for (int64_t n = 0; n < tokens; n += kLanes<T>) {
    const Vec<T> e = first_lanes<T>(weight_below<In>(load(scores + n), peak, factor), tokens - n, T(0));
    store(scores + n, e);
    total += e;
  }
  return sum<T>(total);
}

// The scores and dP of a row become P and scale * dS, which is 0 past the last.
template <class In, class T>
void softmax_backward_of_row(T* scores, T* grads, int64_t tokens, T factor, T scale) {
  const T inverse = T(1) / exponentials_of_row<In>(scores, tokens, factor);
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
