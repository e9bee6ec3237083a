// Self-attention of a packed qkv of any length and its gradient. A warp holds 16 rows of whatever it computes in
// registers and the other side of each product passes through shared memory in tiles, so no N x N matrix exists
// anywhere. The backward recomputes the softmax instead of reading saved statistics, and one thread block owns a head:
// it has no atomics, and two runs agree bit for bit.
#include <algorithm>
#include <cfloat>

#include "attention.cuh"
#include "tile.cuh"

namespace vitkd::cuda {
namespace {

// Shared memory: at most 80 KiB, in the backward; a block gets 99 KiB on sm_86, sm_89 and sm_120.
template <class T, int D>
struct Shape {
  static constexpr int kRowBytes = D * sizeof(T);
  static constexpr int kWarps = kRowBytes > 256 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * 16;  // held by a block
  // Passing through. 64 columns of two accumulators beside 64 of the result are 192 of the 255 registers.
  static constexpr int kColumns = kRowBytes <= 128 ? 64 : kRowBytes <= 256 ? 32 : 16;
  static constexpr int kHeldTile = kRows * kPitch<T, D>;
  static constexpr int kWarpTile = 16 * kPitch<T, D>;
  static constexpr size_t kForwardBytes = sizeof(T) * (kRows + 4 * kColumns) * kPitch<T, D>;
  static constexpr size_t kBackwardBytes = sizeof(T) * (2 * kRows + 4 * kColumns) * kPitch<T, D>;
};

// Queries whose softmax statistics a block of the backward keeps at a time. More tokens than these are treated in
// chunks, and dK and dV are then rounded once more per chunk.
constexpr int64_t kChunk = 1024;

template <class T, class Problem>
__device__ Rows<const T> rows_of(const Problem& p, Part part, int64_t batch, int64_t head, bool vectors) {
  const auto& stride = p.qkv_stride;
  const T* data = static_cast<const T*>(p.qkv) + batch * stride[0] + part * stride[2] + head * stride[3];
  return {data, stride[1], p.tokens, static_cast<int>(p.head_dim), vectors};
}

// How scores become weights, exp(scale * (score - the row's largest)). Of 16-bit elements a logit is the score times
// scale * log2(e), and a weight one instruction. float32 must not round a product that is large where the difference
// is small: there a logit is the score times the sign of the scale, and the difference is scaled.
template <class T>
struct Scale {
  static constexpr bool kExact = std::is_same_v<T, float>;
  float of_score, of_difference;

  explicit Scale(double scale)
      : of_score(static_cast<float>(kExact ? (scale > 0) - (scale < 0) : scale * kLog2E)),
        of_difference(scale == 0 ? 1.0f : std::max(static_cast<float>(std::fabs(scale)), FLT_MIN)) {}

  __device__ __forceinline__ float logit(float score) const { return score * of_score; }
  __device__ __forceinline__ float weight(float logit, float largest) const {
    if constexpr (kExact) return expf((logit - largest) * of_difference);
    else return fast_exp2(logit - largest);
  }
};

// Columns past the last key become -inf, never 0, which would outweigh a row of very negative scores.
template <class T, int kTiles>
__device__ __forceinline__ void to_logits(float (&scores)[kTiles][4], const Scale<T>& scale, int64_t columns) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    const bool inside = i / 4 * 8 + accumulator_column(lane, i % 4) < columns;
    scores[i / 4][i % 4] = inside ? scale.logit(scores[i / 4][i % 4]) : -kInfinity;
  }
}

// term(0) + ... + term(kCount - 1), for float32 as a tree: half as many roundings in a row for each doubling, and equal
// terms, as of tokens that are all alike, add up without any.
template <class T, int kCount, class Term>
__device__ __forceinline__ float sum_of(Term term, int first = 0) {
  if constexpr (!Scale<T>::kExact) {
    float sum = term(0);
#pragma unroll
    for (int i = 1; i < kCount; ++i) sum += term(i);
    return sum;
  } else if constexpr (kCount == 1) {
    return term(first);
  } else {
    return sum_of<T, kCount / 2>(term, first) + sum_of<T, kCount / 2>(term, first + kCount / 2);
  }
}

// Softmax of a lane's two rows while their columns arrive tile by tile. The four lanes of a quad share the rows. What
// a tile adds is summed by itself: one chain over all keys would gather their roundings.
struct Softmax {
  float shift[2] = {-kInfinity, -kInfinity};  // the largest logit so far
  float sum[2] = {0, 0};                      // over this lane's columns, of the weights

  // Turns logits into weights and says by what all earlier ones must be multiplied.
  template <class T, int kTiles>
  __device__ __forceinline__ void update(float (&logits)[kTiles][4], float (&correction)[2], const Scale<T>& scale) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float peak = shift[row];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) peak = fmaxf(peak, logits[i / 2][2 * row + i % 2]);
      peak = quad_max(peak);
      if (peak == -kInfinity) peak = kLowest;  // so that exp(-inf - peak) is 0, not NaN
      correction[row] = scale.weight(shift[row], peak);
      shift[row] = peak;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        float& logit = logits[i / 2][2 * row + i % 2];
        logit = scale.weight(logit, peak);
      }
      const float part = sum_of<T, 2 * kTiles>([&](int i) { return logits[i / 2][2 * row + i % 2]; });
      sum[row] = fmaf(sum[row], correction[row], part);
    }
  }
};

// 1 / x, for float32 rounded but once.
template <class T>
__device__ __forceinline__ float inverse_of(float x) {
  if constexpr (Scale<T>::kExact) return 1 / x;
  else return reciprocal(x);
}

template <int kTiles>
__device__ __forceinline__ void scale_rows(float (&product)[kTiles][4], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) product[i / 4][i % 4] *= factor[i % 4 / 2];
}

// One block: kRows queries of one head.
template <class T, int D>
__global__ void __launch_bounds__(Shape<T, D>::kThreads)
    attention_forward_kernel(const Attention p, const Scale<T> scale, const bool vectors) {
  using S = Shape<T, D>;
  const int64_t strips = (p.tokens + S::kRows - 1) / S::kRows;
  const int64_t strip = int64_t{blockIdx.x} % strips, owner = int64_t{blockIdx.x} / strips;
  const int64_t batch = owner / p.heads, head = owner % p.heads;
  const int warp = threadIdx.x / kWarp;
  T* const queries = shared_memory<T>();
  T* const my_queries = queries + warp * S::kWarpTile;
  const int64_t my_first = strip * S::kRows + warp * 16;

  load_tile<T, D, S::kRows, S::kThreads>(queries, rows_of<T>(p, kQuery, batch, head, vectors), strip * S::kRows);
  const auto key_rows = rows_of<T>(p, kKey, batch, head, vectors);
  const auto value_rows = rows_of<T>(p, kValue, batch, head, vectors);
  float out[D / 8][4] = {};
  Softmax softmax;
  stream<T, D, S::kColumns, S::kThreads>(
      queries + S::kHeldTile, key_rows, value_rows, 0, p.tokens, [&](const T* keys, const T* values, int64_t start) {
        if (my_first >= p.tokens) return;
        float weights[S::kColumns / 8][4] = {}, correction[2];
        multiply_transposed<T, D>(weights, my_queries, keys);
        to_logits(weights, scale, p.tokens - start);
        softmax.update(weights, correction, scale);
        scale_rows(out, correction);
        multiply<T, D>(out, weights, values);
      });
  const float factor[2] = {inverse_of<T>(quad_sum(softmax.sum[0])), inverse_of<T>(quad_sum(softmax.sum[1]))};
  T* const data = static_cast<T*>(p.out) + (batch * p.tokens * p.heads + head) * p.head_dim;
  const Rows<T> out_rows{data, p.heads * p.head_dim, p.tokens, static_cast<int>(p.head_dim), vectors};
  store_rows<T, D>(out_rows, my_first, out, factor, my_queries);
}

// What the backward of one head shares between its two halves.
template <class T, int D>
struct Backward {
  using S = Shape<T, D>;
  const AttentionBackward& p;
  const Scale<T> scale;
  const bool vectors;
  const int64_t batch, head;
  T* const shared;
  // Of the chunk's queries: largest logit, 1 / sum, and delta = sum_j P_ij dP_ij.
  float *const shift, *const inverse, *const delta;

  __device__ Rows<const T> rows(Part part) const { return rows_of<T>(p, part, batch, head, vectors); }
  __device__ Rows<const T> grad_out_rows() const {
    const auto& stride = p.grad_out_stride;
    const T* data = static_cast<const T*>(p.grad_out) + batch * stride[0] + head * stride[2];
    return {data, stride[1], p.tokens, static_cast<int>(p.head_dim), vectors};
  }
  __device__ Rows<T> grad_rows(Part part) const {
    const int64_t width = p.heads * p.head_dim;
    T* data = static_cast<T*>(p.grad_qkv) + (batch * p.tokens * 3 + part) * width + head * p.head_dim;
    return {data, 3 * width, p.tokens, static_cast<int>(p.head_dim), vectors};
  }
  // This warp's 16 rows of the first and second held tile.
  __device__ T* mine(int tile) const { return shared + tile * S::kHeldTile + threadIdx.x / kWarp * S::kWarpTile; }
  __device__ T* streamed() const { return shared + 2 * S::kHeldTile; }

  // Brings the rows that the block holds now; `stream` waits for them.
  __device__ void hold(const Rows<const T>& first, const Rows<const T>& second, int64_t start) const {
    __syncthreads();
    load_tile<T, D, S::kRows, S::kThreads>(shared, first, start);
    load_tile<T, D, S::kRows, S::kThreads>(shared + S::kHeldTile, second, start);
  }

  // dQ of kRows queries, and their statistics. Keys and values pass twice: delta must be known before dQ.
  __device__ void queries(int64_t start, int64_t chunk) const {
    const int lane = threadIdx.x % kWarp;
    const int64_t my_first = start + threadIdx.x / kWarp * 16;
    hold(rows(kQuery), grad_out_rows(), start);
    Softmax softmax;
    float my_delta[2] = {0, 0};
    stream<T, D, S::kColumns, S::kThreads>(streamed(), rows(kKey), rows(kValue), 0, p.tokens,
                              [&](const T* keys, const T* values, int64_t column) {
                                if (my_first >= p.tokens) return;
                                float weights[S::kColumns / 8][4] = {}, grads[S::kColumns / 8][4] = {}, correction[2];
                                multiply_transposed<T, D>(weights, mine(0), keys);
                                multiply_transposed<T, D>(grads, mine(1), values);
                                to_logits(weights, scale, p.tokens - column);
                                softmax.update(weights, correction, scale);
#pragma unroll
                                for (int row = 0; row < 2; ++row) {
                                  const float part = sum_of<T, S::kColumns / 4>([&](int i) {
                                    return weights[i / 2][2 * row + i % 2] * grads[i / 2][2 * row + i % 2];
                                  });
                                  my_delta[row] = fmaf(my_delta[row], correction[row], part);
                                }
                              });
    float my_inverse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = quad_sum(softmax.sum[row]);
      my_inverse[row] = inverse_of<T>(sum);
      my_delta[row] = quad_sum(my_delta[row]);
      if constexpr (Scale<T>::kExact) my_delta[row] /= sum;
      else my_delta[row] *= my_inverse[row];
      if (lane % 4 == 0) {
        const int64_t query = my_first + accumulator_row(lane, 2 * row);
        const bool inside = query < p.tokens;  // the weights of a query that is not there are 0
        shift[query - chunk] = inside ? softmax.shift[row] : kInfinity;
        inverse[query - chunk] = inside ? my_inverse[row] : 0;
        delta[query - chunk] = inside ? my_delta[row] : 0;
      }
    }
    float grad_query[D / 8][4] = {};
    stream<T, D, S::kColumns, S::kThreads>(streamed(), rows(kKey), rows(kValue), 0, p.tokens,
                              [&](const T* keys, const T* values, int64_t column) {
                                if (my_first >= p.tokens) return;
                                float weights[S::kColumns / 8][4] = {}, grads[S::kColumns / 8][4] = {};
                                multiply_transposed<T, D>(weights, mine(0), keys);
                                multiply_transposed<T, D>(grads, mine(1), values);
                                to_logits(weights, scale, p.tokens - column);
#pragma unroll
                                for (int i = 0; i < S::kColumns / 2; ++i) {
                                  const int row = i % 4 / 2;
                                  const float weight =
                                      scale.weight(weights[i / 4][i % 4], softmax.shift[row]) * my_inverse[row];
                                  grads[i / 4][i % 4] = weight * (grads[i / 4][i % 4] - my_delta[row]);
                                }
                                multiply<T, D>(grad_query, grads, keys);
                              });
    const float factor[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)};
    store_rows<T, D>(grad_rows(kQuery), my_first, grad_query, factor, mine(0));
  }

  // dK and dV of kRows keys from the queries [chunk, end), transposed: rows are keys, columns queries.
  __device__ void keys(int64_t start, int64_t chunk, int64_t end) const {
    const int lane = threadIdx.x % kWarp;
    const int64_t my_first = start + threadIdx.x / kWarp * 16;
    hold(rows(kKey), rows(kValue), start);
    float grad_key[D / 8][4] = {}, grad_value[D / 8][4] = {};
    stream<T, D, S::kColumns, S::kThreads>(streamed(), rows(kQuery), grad_out_rows(), chunk, end,
                              [&](const T* queries, const T* grad_out, int64_t column) {
                                if (my_first >= p.tokens) return;
                                float weights[S::kColumns / 8][4] = {}, grads[S::kColumns / 8][4] = {};
                                multiply_transposed<T, D>(weights, mine(0), queries);
                                const int first = static_cast<int>(column - chunk);
#pragma unroll
                                for (int i = 0; i < S::kColumns / 2; ++i) {
                                  const int query = first + i / 4 * 8 + accumulator_column(lane, i % 4);
                                  float& weight = weights[i / 4][i % 4];
                                  const float factor = inverse[query];  // 0: no such query, and 0 * inf may be here
                                  weight = factor == 0 ? 0 : scale.weight(scale.logit(weight), shift[query]) * factor;
                                }
                                multiply<T, D>(grad_value, weights, grad_out);
                                multiply_transposed<T, D>(grads, mine(1), grad_out);
#pragma unroll
                                for (int i = 0; i < S::kColumns / 2; ++i) {
                                  const int query = first + i / 4 * 8 + accumulator_column(lane, i % 4);
                                  grads[i / 4][i % 4] = weights[i / 4][i % 4] * (grads[i / 4][i % 4] - delta[query]);
                                }
                                multiply<T, D>(grad_key, grads, queries);
                              });
    const float factor[2] = {static_cast<float>(p.scale), static_cast<float>(p.scale)}, one[2] = {1, 1};
    store_rows<T, D>(grad_rows(kKey), my_first, grad_key, factor, mine(0), chunk > 0);
    store_rows<T, D>(grad_rows(kValue), my_first, grad_value, one, mine(1), chunk > 0);
  }
};

__host__ __device__ int64_t statistics_per_block(int64_t tokens, int rows) {
  return tokens < kChunk ? (tokens + rows - 1) / rows * rows : kChunk;
}
size_t statistics_bytes(int64_t tokens, int rows) { return 3 * sizeof(float) * statistics_per_block(tokens, rows); }

// One block: one head.
template <class T, int D>
__global__ void __launch_bounds__(Shape<T, D>::kThreads, 2)
    attention_backward_kernel(const AttentionBackward p, const Scale<T> scale, const bool vectors) {
  using S = Shape<T, D>;
  const int64_t owner = blockIdx.x, count = statistics_per_block(p.tokens, S::kRows);
  T* const shared = shared_memory<T>();
  float* const statistics = reinterpret_cast<float*>(shared + S::kBackwardBytes / sizeof(T));
  const Backward<T, D> backward{p,      scale,      vectors,           owner / p.heads,       owner % p.heads,
                                shared, statistics, statistics + count, statistics + 2 * count};
  for (int64_t chunk = 0; chunk < p.tokens; chunk += kChunk) {
    const int64_t end = chunk + kChunk < p.tokens ? chunk + kChunk : p.tokens;
    for (int64_t start = chunk; start < end; start += S::kRows) backward.queries(start, chunk);
    for (int64_t start = 0; start < p.tokens; start += S::kRows) backward.keys(start, chunk, end);
  }
}

template <class T, int D>
const char* queue_width(const Attention& p, void* stream) {
  using S = Shape<T, D>;
  const int64_t strips = (p.tokens + S::kRows - 1) / S::kRows;
  return launch(attention_forward_kernel<T, D>, p.batch * p.heads * strips, S::kThreads, S::kForwardBytes, stream, p,
                Scale<T>(p.scale), fits_vectors(sizeof(T), p));
}

template <class T, int D>
const char* queue_width(const AttentionBackward& p, void* stream) {
  using S = Shape<T, D>;
  const size_t bytes = S::kBackwardBytes + statistics_bytes(p.tokens, S::kRows);
  return launch(attention_backward_kernel<T, D>, p.batch * p.heads, S::kThreads, bytes, stream, p, Scale<T>(p.scale),
                fits_vectors(sizeof(T), p));
}

// The width that a head is padded to. Each is compiled for every GPU, float32 at 2 to 4 s apiece, hence not all.
template <class T>
constexpr int padded(int head_dim) {
  const int step = std::is_same_v<T, float> || head_dim > 96 ? 32 : 16;
  return (head_dim + step - 1) / step * step;
}

template <class T, class Problem>
const char* queue(const Problem& p, void* stream) {
  switch ((p.head_dim + 15) / 16) {
    case 1: return queue_width<T, padded<T>(16)>(p, stream);
    case 2: return queue_width<T, padded<T>(32)>(p, stream);
    case 3: return queue_width<T, padded<T>(48)>(p, stream);
    case 4: return queue_width<T, padded<T>(64)>(p, stream);
    case 5: return queue_width<T, padded<T>(80)>(p, stream);
    case 6: return queue_width<T, padded<T>(96)>(p, stream);
    case 7:
    case 8: return queue_width<T, padded<T>(128)>(p, stream);
  }
  return "unsupported head_dim: the CUDA attention takes 1 to 128";
}

template <class Problem>
const char* queue(const Problem& p, void* stream) {
  switch (p.dtype) {
    case DType::float32: return queue<float>(p, stream);
    case DType::bfloat16: return queue<bfloat16>(p, stream);
    case DType::float16: return queue<float16>(p, stream);
    default: return "unsupported dtype: the CUDA attention takes float32, bfloat16 and float16";
  }
}

}  // namespace

const char* queue_streamed(const Attention& p, void* stream) { return queue(p, stream); }
const char* queue_streamed(const AttentionBackward& p, void* stream) { return queue(p, stream); }

}  // namespace vitkd::cuda
