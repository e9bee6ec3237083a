// A whole head in shared memory, for the lengths where Vision Transformers live: its matrices, the pieces of them that
// tensor cores take, and the way back to global memory. 16-bit elements only.
#pragma once

#include "attention.cuh"

namespace vitkd::cuda {

// Where element (row, column) of a (rows, D) matrix lies. A row's 16-byte units change places with the row's number, so
// that one unit of 8 consecutive rows falls into 8 different groups of banks. Padding would do that too, but for 9 to
// 12 % of the memory that decides how many heads an SM holds.
template <int D>
__host__ __device__ constexpr int swizzled(int row, int column) {
  static_assert(D == 32 || D == 64, "a row is half of the 128 bytes that all banks hold, or all of them");
  const int turn = D == 64 ? row % 8 : row / 2 % 4;
  return row * D + (column / 8 ^ turn) * 8 + column % 8;
}

// Elements from one row of a matrix of weights to the next: an odd number of 16-byte units, to the same end.
template <int kTiles>
constexpr int kWeightPitch = 16 * kTiles + 8;

// The rows of one head in global memory, each a whole number of 16-byte units, less than 2^31 elements apart.
template <class T>
struct HeadRows {
  T* data;
  int stride;

  __device__ T* row(int i) const { return data + i * stride; }
};

// Which head of the batch. 32 bits, so that a division is not a function.
struct Owner {
  unsigned batch, head;

  template <class Problem>
  __device__ Owner(const Problem& p, unsigned owner)
      : batch(owner / static_cast<unsigned>(p.heads)), head(owner % static_cast<unsigned>(p.heads)) {}

  // As many heads on as lie before `step`, without a division.
  template <class Problem>
  __device__ void advance(const Problem& p, const Owner& step) {
    batch += step.batch;
    head += step.head;
    if (head >= static_cast<unsigned>(p.heads)) head -= static_cast<unsigned>(p.heads), ++batch;
  }
};

template <class T, class Problem>
__device__ HeadRows<const T> rows_of(const Problem& p, Part part, const Owner& owner) {
  const auto& stride = p.qkv_stride;
  const T* data = static_cast<const T*>(p.qkv) + owner.batch * stride[0] + part * stride[2] + owner.head * stride[3];
  return {data, static_cast<int>(stride[1])};
}

template <class T>
__device__ HeadRows<const T> grad_out_rows(const AttentionBackward& p, const Owner& owner) {
  const auto& stride = p.grad_out_stride;
  const T* data = static_cast<const T*>(p.grad_out) + owner.batch * stride[0] + owner.head * stride[2];
  return {data, static_cast<int>(stride[1])};
}

template <class T, int D>
__device__ HeadRows<T> out_rows(const Attention& p, const Owner& owner) {
  T* data = static_cast<T*>(p.out) + (owner.batch * p.tokens * p.heads + owner.head) * D;
  return {data, static_cast<int>(p.heads) * D};
}

template <class T, int D>
__device__ HeadRows<T> grad_rows(const AttentionBackward& p, Part part, const Owner& owner) {
  const int width = static_cast<int>(p.heads) * D;
  T* data = static_cast<T*>(p.grad_qkv) + (owner.batch * p.tokens * 3 + part) * width + owner.head * D;
  return {data, 3 * width};
}

// Starts to bring kRows rows by kThreads threads; those that are not there become zeros.
template <class T, int D, int kRows, int kThreads>
__device__ __forceinline__ void bring(T* matrix, const HeadRows<const T>& from, int rows, int thread) {
  constexpr int kUnits = D / 8;
#pragma unroll 4
  for (int i = thread; i < kRows * kUnits; i += kThreads) {
    const int row = i / kUnits, column = i % kUnits * 8;
    const bool inside = row < rows;
    copy_async(matrix + swizzled<D>(row, column), inside ? from.row(row) + column : from.data, inside);
  }
}

// 16 rows as left operands of D / 16 products, in registers or in shared memory from row `first` on.
template <int D>
struct Strip {
  uint32_t registers[D / 16][4];

  __device__ void operand(uint32_t (&a)[4], int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = registers[k][i];
  }

  // From global memory, with zeros for rows that are not there.
  template <class T>
  __device__ void load(const HeadRows<const T>& from, int first, int rows) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane / 4 + 8 * half;
      const T* const data = from.row(row < rows ? row : 0) + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const uint32_t both = *reinterpret_cast<const uint32_t*>(data + i * 8);
        registers[i / 2][i % 2 * 2 + half] = row < rows ? both : 0;
      }
    }
  }
};

template <class T, int D>
struct SharedStrip {
  const T* matrix;
  int first;

  __device__ void operand(uint32_t (&a)[4], int k) const {
    const int lane = threadIdx.x % kWarp;
    load_matrices<false>(a, matrix + swizzled<D>(first + lane % 16, k * 16 + lane / 16 * 8));
  }
};

// A left operand into shared memory, rows of 16 elements `pitch` apart.
template <class T>
__device__ __forceinline__ void store_operand(T* to, int pitch, const uint32_t (&a)[4]) {
  const int lane = threadIdx.x % kWarp;
  if (stores_matrices()) {
    store_matrices(to + (lane / 8 % 2 * 8 + lane % 8) * pitch + lane / 16 * 8, a);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    *reinterpret_cast<uint32_t*>(to + (lane / 4 + i % 2 * 8) * pitch + i / 2 * 8 + lane % 4 * 2) = a[i];
}

// 16 rows that store_operand has written.
template <class T>
struct SharedOperands {
  const T* data;
  int pitch;

  __device__ void load(uint32_t (&a)[4], int tile) const {
    const int lane = threadIdx.x % kWarp;
    load_matrices<false>(a, data + lane % 16 * pitch + tile * 16 + lane / 16 * 8);
  }
};

// A left operand from a matrix of weights: 16 columns become its rows, 16 rows what is summed over.
template <class T, int kTiles>
__device__ __forceinline__ void load_columns(uint32_t (&columns)[4], const T* weights, int first_row,
                                             int first_column) {
  const int lane = threadIdx.x % kWarp;
  const int row = first_row + lane / 16 * 8 + lane % 8, column = first_column + lane / 8 % 2 * 8;
  load_matrices<true>(columns, weights + row * kWeightPitch<kTiles> + column);
}

// A lane has two rows of a strip's scores, 8 rows apart: elements 0, 1 and 2, 3 of every accumulator.
template <int kTiles>
using Scores = float[kTiles][2][4];

// Columns from `columns` on, which are after the first kFull tiles, weigh nothing.
template <int kFull, int kTiles>
__device__ __forceinline__ void hide_from(int columns, Scores<kTiles>& scores) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 8 * kFull; i < 8 * kTiles; ++i)
    if (i / 4 * 8 + accumulator_column(lane, i % 4) >= columns) scores[i / 8][i / 4 % 2][i % 4] = -kInfinity;
}

template <int kTiles>
__device__ __forceinline__ float largest(const Scores<kTiles>& scores, int row) {
  float peak = -kInfinity;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const float (&four)[4] = scores[i / 2][i % 2];
    peak = fmaxf(peak, fmaxf(four[2 * row], four[2 * row + 1]));
  }
  return quad_max(peak);
}

// One row of a softmax that comes in parts: the largest score so far. What was summed below an earlier one, if there
// was a part before, is brought below this one.
template <bool kEarlier, int kTiles, int kColumns>
__device__ __forceinline__ float raise(const Scores<kTiles>& scores, int row, float factor, float (&shift)[2],
                                       float (&sum)[2], float (&out)[kColumns][4]) {
  const float before = shift[row];
  const float now = fmaxf(fmaxf(before, largest(scores, row)), kLowest);  // exp2(-inf - now) is 0, not NaN
  shift[row] = now;
  if (kEarlier) {
    const float correction = fast_exp2((before - now) * factor);
    sum[row] *= correction;
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) out[i / 2][2 * row + i % 2] *= correction;
  }
  return now;
}

// What is to be taken off a row's exponents, factor * score, that the largest becomes 0, in the fused multiply-add that
// makes them. As long as it is small, `shift` is rounded by less than a weight of bfloat16 is; where by more than an
// exponent can be, the largest is taken off the scores themselves.
template <int kTiles>
__device__ __forceinline__ float shift_of(Scores<kTiles>& scores, int row, float peak, float shift) {
  constexpr float kSmall = 1 << 14;
  if (!(fabsf(shift) >= kSmall)) return shift;  // NaN stays
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) scores[i / 4][i / 2 % 2][2 * row + i % 2] -= peak;
  return 0;
}

// A part of a strip's scores becomes weights, left operands for `out`, which has the earlier parts' output, if there
// are any. kFused: by one fma each, which is as good only where the largest weight rounds to 1 all the same.
template <class T, bool kEarlier, bool kFused, int kTiles, int kColumns>
__device__ __forceinline__ void weigh(uint32_t (&weights)[kTiles][4], Scores<kTiles>& scores, float factor,
                                      float (&shift)[2], float (&sum)[2], float (&out)[kColumns][4]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float now = raise<kEarlier>(scores, row, factor, shift, sum, out);
    const float scaled = kFused ? shift_of(scores, row, now, fmaxf(now * factor, kLowest)) : 0;
    const auto weight = [&](float score) {
      return fast_exp2(kFused ? fmaf(score, factor, -scaled) : (score - now) * factor);
    };
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float (&four)[4] = scores[i / 2][i % 2];
      const float left = weight(four[2 * row]), right = weight(four[2 * row + 1]);
      sum[row] += left;
      sum[row] += right;
      weights[i / 2][i % 2 * 2 + row] = pack<T>(left, right);
    }
  }
}

// By what a row's scores are multiplied to become exponents in a fused multiply-add, from which the largest of them,
// rounded, is taken off. What it is off by is in all of a row's weights and goes with their sum, unless it is more than
// an exponent can be: from 2^30 on a power of two, by which nothing is rounded, does as well, for there two scores that
// differ do so by 32 or more. Not on sm_100, where the one register that it takes is one too many.
__device__ __forceinline__ float factor_of(float peak, float factor) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1100
  return factor;
#endif
  constexpr float kLarge = 1 << 30;
  return fabsf(peak * factor) >= kLarge ? __uint_as_float(__float_as_uint(factor) & 0xff800000u) : factor;
}

// A strip's whole softmax, as left operands.
template <class T, int kTiles>
__device__ __forceinline__ void softmax(uint32_t (&weights)[kTiles][4], Scores<kTiles>& scores, float factor) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float peak = largest(scores, row), exact = factor_of(peak, factor), shift = peak * exact;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      float& score = scores[i / 4][i / 2 % 2][2 * row + i % 2];
      score = fast_exp2(fmaf(score, exact, -shift));
      sum += score;
    }
    const float inverse = reciprocal(quad_sum(sum));
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float (&four)[4] = scores[i / 2][i % 2];
      weights[i / 2][i % 2 * 2 + row] = pack<T>(four[2 * row] * inverse, four[2 * row + 1] * inverse);
    }
  }
}

// The largest score must be the largest logit: a negative scale goes into the queries' signs.
__device__ __forceinline__ uint32_t sign_of(float scale_log2) { return scale_log2 < 0 ? 0x80008000u : 0; }

// product (16 x 16*kTiles) += strip matrix^T, the strip's signs turned by `sign`. Only the first `tiles` tiles of 16
// rows of the matrix are there, and at least kSure of them.
template <class T, int D, int kSure, int kTiles, class LeftStrip>
__device__ __forceinline__ void multiply_transposed(float (&product)[kTiles][2][4], const LeftStrip& strip,
                                                    const T* matrix, int tiles, uint32_t sign = 0) {
  const int lane = (D == 32 ? recomputed(threadIdx.x) : threadIdx.x) % kWarp;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[4];
    strip.operand(a, k);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] ^= sign;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile >= kSure && tile >= tiles) break;
      uint32_t b[4];
      const int row = tile * 16 + lane / 16 * 8 + lane % 8, column = k * 16 + lane / 8 % 2 * 8;
      load_matrices<false>(b, matrix + swizzled<D>(row, column));
      mma<T>(product[tile][0], a, b[0], b[1]);
      mma<T>(product[tile][1], a, b[2], b[3]);
    }
  }
}

// For each of kStrips: product (16 x D) += a (16 x 16) times the 16 rows of `matrix` from `first` on, which are loaded
// once for all strips.
template <class T, int D, int kStrips>
__device__ __forceinline__ void multiply(float (&product)[kStrips][D / 8][4], const uint32_t (&a)[kStrips][4],
                                         const T* matrix, int first) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int column = 0; column < D; column += 16) {
    uint32_t b[4];
    load_matrices<true>(b, matrix + swizzled<D>(first + lane % 16, column + lane / 16 * 8));
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      mma<T>(product[strip][column / 8], a[strip], b[0], b[1]);
      mma<T>(product[strip][column / 8 + 1], a[strip], b[2], b[3]);
    }
  }
}

template <class T, int D>
__device__ __forceinline__ void multiply(float (&product)[D / 8][4], const uint32_t (&a)[4], const T* matrix,
                                         int first) {
  multiply<T, D>(reinterpret_cast<float(&)[1][D / 8][4]>(product), reinterpret_cast<const uint32_t(&)[1][4]>(a), matrix,
                 first);
}

// Register i of lane j changes places with register j of lane i, in every quad.
__device__ __forceinline__ void transpose_quad(uint32_t (&registers)[4]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t received = shuffle_xor(upper ? registers[i] : registers[i + step], step);
      if (upper)
        registers[i] = received;
      else
        registers[i + step] = received;
    }
  }
}

// Writes a warp's 16 x D accumulator, times `factor` for its upper and lower 8 rows, to rows `first`... A lane holds
// pairs of elements; the quad turns them into 16 bytes of one lane, so that shared memory is not needed for it.
template <class T, int D>
__device__ __forceinline__ void store_strip(const HeadRows<T>& to, int first, int rows,
                                            const float (&product)[D / 8][4], const float (&factor)[2]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + 8 * half;
#pragma unroll
    for (int group = 0; group < D / 32; ++group) {
      Vector<uint32_t> packed;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& pair = product[group * 4 + i];
        packed.values[i] = pack<T>(pair[2 * half] * factor[half], pair[2 * half + 1] * factor[half]);
      }
      transpose_quad(packed.values);
      if (row < rows) store_vector(to.row(row) + group * 32 + lane % 4 * 8, packed);
    }
  }
}

}  // namespace vitkd::cuda
