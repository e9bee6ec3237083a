// Tiles: 16 and more rows of a (tokens, head_dim) matrix in shared memory, and the two products of one warp's 16 rows.
#pragma once

#include "device.cuh"

namespace vitkd::cuda {

// The rows of one head in global memory. `vectors`: every row starts on 16 bytes and is a whole number of them.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  int64_t tokens;
  int head_dim;
  bool vectors;
};

// Elements from one row of a tile to the next: an odd number of 16-byte units, so that 8 consecutive rows fall into
// 8 different groups of banks.
template <class T, int D>
constexpr int kPitch = D + kVector<T>;

// Starts to bring kRows rows from row `start` on; outside the matrix a tile holds zeros.
template <class T, int D, int kRows, int kThreads>
__device__ __forceinline__ void load_tile(T* tile, const Rows<const T>& from, int64_t start) {
  constexpr int kVectors = D / kVector<T>;
  if (from.vectors) {
#pragma unroll 2
    for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
      const int row = i / kVectors, column = i % kVectors * kVector<T>;
      const bool inside = start + row < from.tokens && column < from.head_dim;
      const T* source = inside ? from.data + (start + row) * from.stride + column : from.data;
      copy_async(tile + row * kPitch<T, D> + column, source, inside);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * D; i += kThreads) {
      const int row = i / D, column = i % D;
      const bool inside = start + row < from.tokens && column < from.head_dim;
      tile[row * kPitch<T, D> + column] = inside ? from.data[(start + row) * from.stride + column] : T{};
    }
  }
}

// Passes rows [begin, end) of two matrices through shared memory, kRows at a time: `body(first, second, start)` works
// on one pair of tiles while the next is on its way. Joins all copies begun before. Called by the whole block.
template <class T, int D, int kRows, int kThreads, class Body>
__device__ __forceinline__ void stream(T* buffers, const Rows<const T>& first, const Rows<const T>& second,
                                       int64_t begin, int64_t end, Body body) {
  constexpr int kTile = kRows * kPitch<T, D>;
  T *ready = buffers, *coming = buffers + 2 * kTile;
  for (int64_t start = begin - kRows; start < end; start += kRows) {
    if (start + kRows < end) {
      load_tile<T, D, kRows, kThreads>(coming, first, start + kRows);
      load_tile<T, D, kRows, kThreads>(coming + kTile, second, start + kRows);
    }
    copy_async_commit();
    if (start >= begin) {
      copy_async_wait<1>();
      __syncthreads();
      body(ready, ready + kTile, start);
      __syncthreads();
    }
    T* const used = ready;
    ready = coming;
    coming = used;
  }
}

// product (16 x 8*kTiles) += a (16 x D) b^T, with a and b (8*kTiles x D) tiles in shared memory.
template <class T, int D, int kTiles>
__device__ __forceinline__ void multiply_transposed(float (&product)[kTiles][4], const T* a, const T* b) {
  constexpr int kP = kPitch<T, D>;
  const int lane = threadIdx.x % kWarp;
  if constexpr (std::is_same_v<T, float>) {
    const float* a_low = a + accumulator_row(lane, 0) * kP;
    const float* a_high = a + accumulator_row(lane, 2) * kP;
    const float* b_even = b + accumulator_column(lane, 0) * kP;
#pragma unroll (D == 96 ? 1 : 2)
    for (int k = 0; k < D; k += 4) {
      const auto low = *reinterpret_cast<const Vector<float>*>(a_low + k);
      const auto high = *reinterpret_cast<const Vector<float>*>(a_high + k);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const auto other = *reinterpret_cast<const Vector<float>*>(b_even + (i / 2 * 8 + i % 2) * kP + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          product[i / 2][i % 2] = fmaf(low.values[j], other.values[j], product[i / 2][i % 2]);
          product[i / 2][2 + i % 2] = fmaf(high.values[j], other.values[j], product[i / 2][2 + i % 2]);
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      uint32_t a_registers[4];
      load_matrices<false>(a_registers, a + lane % 16 * kP + k + lane / 16 * 8);
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        uint32_t b_registers[4];
        load_matrices<false>(b_registers, b + (tile * 8 + lane / 16 * 8 + lane % 8) * kP + k + lane / 8 % 2 * 8);
        mma<T>(product[tile], a_registers, b_registers[0], b_registers[1]);
        mma<T>(product[tile + 1], a_registers, b_registers[2], b_registers[3]);
      }
    }
  }
}

// product (16 x D) += a (16 x 8*kTiles) b, with a an accumulator in registers (rounded to T) and b (8*kTiles x D) a
// tile in shared memory. float32 sums a tile by itself, so that no chain of additions is as long as the sequence; a few
// columns at a time, for the registers that this takes.
template <class T, int D, int kTiles>
__device__ __forceinline__ void multiply(float (&product)[D / 8][4], const float (&a)[kTiles][4], const T* b) {
  constexpr int kP = kPitch<T, D>;
  const int lane = threadIdx.x % kWarp;
  if constexpr (std::is_same_v<T, float>) {
    constexpr int kPart = D > 64 ? 2 : 4;  // tiles of 8 columns
#pragma unroll
    for (int first = 0; first < D / 8; first += kPart) {
      float part[kPart][4] = {};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {  // the lane of this quad that holds column k lends it to the others
          const float low = shuffle(a[tile][k % 2], lane / 4 * 4 + k / 2);
          const float high = shuffle(a[tile][2 + k % 2], lane / 4 * 4 + k / 2);
          const float* b_row = b + (tile * 8 + k) * kP + first * 8 + accumulator_column(lane, 0);
#pragma unroll
          for (int i = 0; i < 2 * kPart; ++i) {
            part[i / 2][i % 2] = fmaf(low, b_row[i / 2 * 8 + i % 2], part[i / 2][i % 2]);
            part[i / 2][2 + i % 2] = fmaf(high, b_row[i / 2 * 8 + i % 2], part[i / 2][2 + i % 2]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * kPart; ++i) product[first + i / 4][i % 4] += part[i / 4][i % 4];
      if (D > 64) __syncwarp();
    }
  } else {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 2) {
      uint32_t a_registers[4];
      left_operand<T>(a_registers, a[tile], a[tile + 1]);
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t b_registers[4];
        load_matrices<true>(b_registers, b + (tile * 8 + lane % 16) * kP + n * 8 + lane / 16 * 8);
        mma<T>(product[n], a_registers, b_registers[0], b_registers[1]);
        mma<T>(product[n + 1], a_registers, b_registers[2], b_registers[3]);
      }
    }
  }
}

// Writes a warp's 16 x D accumulator, times `factor` for its upper and lower 8 rows, to rows `first`... of `to`; with
// `add`, on top of what is there. `tile`, 16 rows of shared memory that only this warp uses and no lane still reads,
// turns the accumulator's scattered pairs into whole rows.
template <class T, int D>
__device__ __forceinline__ void store_rows(const Rows<T>& to, int64_t first, const float (&product)[D / 8][4],
                                           const float (&factor)[2], T* tile, bool add = false) {
  constexpr int kVectors = D / kVector<T>;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < D / 2; ++i) {
    const int row = accumulator_row(lane, i % 4), column = i / 4 * 8 + accumulator_column(lane, i % 4);
    float value = product[i / 4][i % 4] * factor[i % 4 / 2];
    if (add && first + row < to.tokens && column < to.head_dim)
      value += to_float(to.data[(first + row) * to.stride + column]);
    from_float(tile[row * kPitch<T, D> + column], value);
  }
  __syncwarp();
  for (int i = lane; i < 16 * kVectors; i += kWarp) {
    const int column = i % kVectors * kVector<T>;
    const int64_t token = first + i / kVectors;
    if (token >= to.tokens || column >= to.head_dim) continue;
    const T* from = tile + i / kVectors * kPitch<T, D> + column;
    T* target = to.data + token * to.stride + column;
    if (to.vectors) {
      *reinterpret_cast<Vector<T>*>(target) = *reinterpret_cast<const Vector<T>*>(from);
    } else {
      for (int j = 0; j < kVector<T> && column + j < to.head_dim; ++j) target[j] = from[j];
    }
  }
}

}  // namespace vitkd::cuda
