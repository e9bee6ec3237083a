// The softmax of a strip of queries and its gradient, down the columns of its scores: as many queries at a time as a
// vector has lanes. The results are operands of products.
#pragma once

#include "lone.h"
#include "sums.h"

namespace vitkd::cpu::VITKD_ISA {

// body(row, constant) for all rows, as many at a time as the constant says, each for another part of the sums.
template <class Body, class... Sums>
inline void by_fours(int64_t rows, Body body, Sums&... sums) {
  constexpr int64_t section = 4 * Sum<float>::kSection;
  int64_t n = 0;
  for (; n + 4 <= rows; n += 4) {
    if (n > 0 && n % section == 0) (sums.end_section(), ...);
    body(n, std::integral_constant<int, 4>{});
  }
  if (rows & 2) body(n, std::integral_constant<int, 2>{}), n += 2;
  if (rows & 1) body(n, std::integral_constant<int, 1>{});
}

template <class T>
Vec<T> column_max(const T* scores, int64_t tokens, int64_t columns) {
  Vec<T> most[4];
  VITKD_UNROLL
  for (int i = 0; i < 4; ++i) most[i] = load(scores);
  by_fours(tokens, [&](int64_t n, auto count) {
    constexpr int rows = count;
    VITKD_UNROLL
    for (int i = 0; i < rows; ++i) most[i] = maximum<T>(load(scores + (n + i) * columns), most[i]);
  });
  return maximum<T>(maximum<T>(most[0], most[1]), maximum<T>(most[2], most[3]));
}

// One vector of columns of scores becomes exp2(factor * (score - max)), as the operand of a sum over keys; in place for
// floats. Returns the sum of each column.
template <class In, class T>
Vec<T> exponentials(T* scores, int64_t tokens, int64_t columns, T factor, In* weights) {
  const Vec<T> peak = column_max(scores, tokens, columns);
  Sum<T> sum;
  by_fours(tokens, [&](int64_t n, auto count) {
    constexpr int rows = count;
    Vec<T> e[rows];
    VITKD_UNROLL
    for (int i = 0; i < rows; ++i) {
      e[i] = weight_below<In>(load(scores + (n + i) * columns), peak, factor);
      sum.parts[i] += e[i];
    }
    if constexpr (kSteps<In> == 1) {
      VITKD_UNROLL
      for (int i = 0; i < rows; ++i) store(weights + (n + i) * columns, e[i]);
    } else {
      VITKD_UNROLL
      for (int i = 0; i < rows; i += 2) {
        store_operand(weights + (n + i) / 2 * columns, join(e[i], i + 1 < rows ? e[i + 1] : Vec<T>{}));
      }
    }
  }, sum);
  return sum.total();
}

// Operands that hold a strip's weights P and their gradient dS = P (dP - sum(P dP)).
template <class In>
struct Softened {
  In *weights_rows, *grad_rows;  // (tokens, tile_depth(columns)): for sums over queries
  In* grad_down;                 // (tokens / steps, columns): for sums over keys
};

// One vector of columns of scores and dP; P and scale * dS, which for floats replace them.
template <class In, class T>
void softmax_backward(T* scores, T* grads, int64_t tokens, int64_t columns, T factor, T scale,
                      const Softened<In>& out) {
  const Vec<T> peak = column_max(scores, tokens, columns);
  const int64_t row = tile_depth<In>(columns);
  Sum<T> sum, dot;
  by_fours(tokens, [&](int64_t n, auto count) {
    constexpr int rows = count;
    VITKD_UNROLL
    for (int i = 0; i < rows; ++i) {
      T* score = scores + (n + i) * columns;
      const Vec<T> e = weight_below<In>(load(score), peak, factor);
      store(score, e);
      sum.parts[i] += e;
      dot.parts[i] += e * load(grads + (n + i) * columns);
    }
  }, sum, dot);
  const Vec<T> inverse = T(1) / sum.total(), scaled = inverse * scale, delta = dot.total() * inverse;
  by_fours(tokens, [&](int64_t n, auto count) {
    constexpr int rows = count;
    Vec<T> p[rows], ds[rows];
    VITKD_UNROLL
    for (int i = 0; i < rows; ++i) {
      const Vec<T> e = load(scores + (n + i) * columns);
      p[i] = e * inverse;
      ds[i] = e * scaled * (load(grads + (n + i) * columns) - delta);
    }
    if constexpr (kSteps<In> == 1) {
      VITKD_UNROLL
      for (int i = 0; i < rows; ++i) {
        store(out.weights_rows + (n + i) * row, p[i]);
        store(out.grad_rows + (n + i) * row, ds[i]);
      }
    } else {
      VITKD_UNROLL
      for (int i = 0; i < rows; ++i) {
        store_narrow(reinterpret_cast<bf16*>(out.weights_rows + (n + i) * row), p[i]);
        store_narrow(reinterpret_cast<bf16*>(out.grad_rows + (n + i) * row), ds[i]);
      }
      VITKD_UNROLL
      for (int i = 0; i < rows; i += 2) {
        store_operand(out.grad_down + (n + i) / 2 * columns, join(ds[i], i + 1 < rows ? ds[i + 1] : Vec<T>{}));
      }
    }
  });
}

// A lone query's P and dS into column n of the operands; pairs narrow them in place.
template <class In, class T>
void to_columns(T* weights, T* grads, int64_t tokens, int64_t n, int64_t columns, const Softened<In>& out) {
  const int64_t row = tile_depth<In>(columns);
  In* const p = operand_row<In>(weights, tokens);
  In* const ds = operand_row<In>(grads, tokens);
  if constexpr (kSteps<In> == 1) {
    row_to_column(p, tokens, out.weights_rows + n, row);
    row_to_column(ds, tokens, out.grad_rows + n, row);
  } else {  // pairs of neighbouring queries, of which this is one, and pairs of neighbouring keys
    const auto each = [](In* pairs) { return reinterpret_cast<bf16*>(pairs); };
    row_to_column(each(p), tokens, each(out.weights_rows) + n, 2 * row);
    row_to_column(each(ds), tokens, each(out.grad_rows) + n, 2 * row);
    row_to_column(ds, steps<In>(tokens), out.grad_down + n, columns);
  }
}

// What scores are multiplied by on their way into exp2: floats took scale * log2(e) into the query, pairs its sign.
template <class In, class T = SumOf<In>>
T exponent_factor(T scale) {
  return kSteps<In> == 1 ? T(1) : scale < 0 ? -scale : scale;
}

}  // namespace vitkd::cpu::VITKD_ISA
