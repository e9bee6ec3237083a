// The product of pairs on AMX: tiles of 16 x 16 sums that take 16 pairs at a time.
//
// Operands are padded to whole tiles: memory for `rows` of A and C up to a multiple of 16, and up to a multiple of 16
// in depth, where A and B hold zeros. The contents of A's padded rows do not matter, nor do C's.
#pragma once

#include "gemm.h"

namespace vitkd::cpu::VITKD_ISA {

// The shape of all eight tiles, for the thread that made it and as long as it lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("" ::"r"(&shape) : "memory");  // gcc 12 believes that only its first 8 bytes are read
    _tile_loadconfig(&shape);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

constexpr int64_t kTile = 16;

// One block of R x V tiles. Tiles 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 columns of B.
template <int R, int V>
void amx_block(const Pair* a, int64_t a_row, const Pair* b, int64_t b_row, float* c, int64_t c_row, int64_t depth,
               bool accumulate) {
  const auto a_bytes = static_cast<size_t>(a_row * 4), b_bytes = static_cast<size_t>(b_row * 4);
  const auto c_bytes = static_cast<size_t>(c_row * 4);
  float* below = c + kTile * c_row;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (V > 1) _tile_loadd(1, c + kTile, c_bytes);
    if constexpr (R > 1) _tile_loadd(2, below, c_bytes);
    if constexpr (R > 1 && V > 1) _tile_loadd(3, below + kTile, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (V > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && V > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTile, a += kTile, b += kTile * b_row) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V > 1) _tile_loadd(7, b + kTile, b_bytes);
    if constexpr (V > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R > 1) _tile_loadd(5, a + kTile * a_row, a_bytes);
    if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (R > 1 && V > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (V > 1) _tile_stored(1, c + kTile, c_bytes);
  if constexpr (R > 1) _tile_stored(2, below, c_bytes);
  if constexpr (R > 1 && V > 1) _tile_stored(3, below + kTile, c_bytes);
}

constexpr int64_t kAmxDepth = 128;  // pairs at a time, so that a turned block of A fits the stack and the first cache

// A tile takes its rows of A one after the other; a block of A whose columns are contiguous is turned first.
inline void turn(const Pair* a, int64_t a_col, int64_t rows, int64_t depth, Pair* out) {
  for (int64_t r = 0; r < rows; r += kTile) {
    for (int64_t k = 0; k < depth; k += kTile) {
      Vec<float> block[kTile];
      VITKD_UNROLL
      for (int64_t i = 0; i < kTile; ++i) block[i] = load(reinterpret_cast<const float*>(a + (k + i) * a_col + r));
      transpose<float>(block);
      VITKD_UNROLL
      for (int64_t i = 0; i < kTile; ++i) store(reinterpret_cast<float*>(out + (r + i) * kAmxDepth + k), block[i]);
    }
  }
}

template <>
inline void gemm<Pair>(Gemm<Pair> g) {
  alignas(64) Pair turned[2 * kTile * kAmxDepth];
  for (int64_t first = 0; first < g.depth; first += kAmxDepth) {
    const int64_t left = g.depth - first < kAmxDepth ? g.depth - first : kAmxDepth;
    const int64_t depth = (left + kTile - 1) / kTile * kTile;
    const bool accumulate = g.accumulate || first > 0;
    for (int64_t row = 0; row < g.rows; row += 2 * kTile) {
      const bool two_rows = g.rows - row > kTile;
      const Pair* a = g.a + row * g.a_row + first * g.a_col;
      int64_t a_row = g.a_row;
      if (g.a_col != 1) {
        turn(a, g.a_col, two_rows ? 2 * kTile : kTile, depth, turned);
        a = turned;
        a_row = kAmxDepth;
      }
      for (int64_t column = 0; column < g.columns; column += 2 * kTile) {
        const bool two_columns = g.columns - column > kTile;
        const Pair* b = g.b + first * g.b_row + column;
        float* c = g.c + row * g.c_row + column;
        g.ahead->some((two_rows ? 2 : 1) * (two_columns ? 2 : 1) * kTile * kTile * depth * kSteps<Pair>);
        auto* block = two_rows ? (two_columns ? amx_block<2, 2> : amx_block<2, 1>)
                               : (two_columns ? amx_block<1, 2> : amx_block<1, 1>);
        block(a, a_row, b, g.b_row, c, g.c_row, depth, accumulate);
      }
    }
  }
}

}  // namespace vitkd::cpu::VITKD_ISA
