// Self-attention of ViT-short heads and its gradient: a thread block has all of a head in shared memory and a warp
// whole rows of its scores in registers, so that the softmax takes one pass, nothing is read twice and nothing is saved
// for the backward. Only what a 16x16 tile needs is padded. See README.md.
#include "head.cuh"
#include "sizes.cuh"

namespace vitkd::cuda {
namespace {

template <int D, int kTiles>
struct ForwardShape {
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kMatrix = kRows * D;
  // Strips of 16 queries per warp, one after the other, and warps per head. 8 warps of an SM's 16 may have 255
  // registers each, 12 168, 16 128; 13 warps count as 16, because a quarter of the SM holds 4 of them.
  static constexpr int kStrips = kTiles > 13 ? 3 : kTiles > 7 ? 2 : 1;
  static constexpr int kWarps = (kTiles + kStrips - 1) / kStrips;
  static constexpr int kHeads = kTiles > 5 ? 1 : 8 / kTiles;  // per block
  static constexpr int kHeadThreads = kWarps * kWarp;
  static constexpr int kThreads = kHeads * kHeadThreads;
  static constexpr size_t kBytes = size_t{2} * kHeads * 3 * kMatrix;
  // Scores in registers at first, of a row that is too long for them all: the halves at which nothing spills.
  static constexpr int kPart = kTiles > 13 ? 7 : kTiles > 10 ? 5 : kTiles;
};

// Adds a part of the keys and values, tiles [kFirst, kFirst + kPart) of the head, to a strip's softmax and output.
template <class T, int D, int kBelow, int kFirst, int kPart>
__device__ __forceinline__ void add_part(float (&out)[D / 8][4], float (&shift)[2], float (&sum)[2],
                                         const SharedStrip<T, D>& strip, const T* keys, const T* values, int tokens,
                                         float scale_log2) {
  constexpr int kSure = kBelow + 1 - kFirst;
  const int tiles = (tokens + 15) / 16 - kFirst;
  const float factor = fabsf(scale_log2);
  Scores<kPart> scores = {};
  multiply_transposed<T, D, kSure>(scores, strip, keys + kFirst * 16 * D, tiles, sign_of(scale_log2));
  hide_from<(kSure > 0 ? kSure - 1 : 0)>(tokens - kFirst * 16, scores);
  uint32_t weights[kPart][4];
  weigh<T, (kFirst > 0), false>(weights, scores, factor, shift, sum, out);
#pragma unroll
  for (int tile = 0; tile < kPart; ++tile) {
    if (tile >= kSure && tile >= tiles) break;
    multiply<T, D>(out, weights[tile], values, (kFirst + tile) * 16);
  }
}

// A block is one head, or several short ones. The head has more than 16 * kBelow tokens, and at most 16 * kTiles.
template <class T, int D, int kBelow, int kTiles>
__global__ void __launch_bounds__(ForwardShape<D, kTiles>::kThreads, 2)
    attention_head_forward_kernel(const Attention p, const float scale_log2) {
  using S = ForwardShape<D, kTiles>;
  const int in_block = S::kHeads > 1 ? threadIdx.x / S::kHeadThreads : 0;
  const int thread = threadIdx.x - in_block * S::kHeadThreads, warp = thread / kWarp;
  const int tokens = static_cast<int>(p.tokens);
  const unsigned index = blockIdx.x * S::kHeads + in_block;
  const bool present = index < p.batch * p.heads;
  const Owner owner(p, index);
  T* const queries = shared_memory<T>() + in_block * 3 * S::kMatrix;
  T *const keys = queries + S::kMatrix, *const values = keys + S::kMatrix;
  if (present) {
    bring<T, D, S::kRows, S::kHeadThreads>(queries, rows_of<T>(p, kQuery, owner), tokens, thread);
    bring<T, D, S::kRows, S::kHeadThreads>(keys, rows_of<T>(p, kKey, owner), tokens, thread);
    bring<T, D, S::kRows, S::kHeadThreads>(values, rows_of<T>(p, kValue, owner), tokens, thread);
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  if (!present) return;

  const HeadRows<T> to = out_rows<T, D>(p, owner);
#pragma unroll 1
  for (int i = 0; i < S::kStrips; ++i) {
    const int first = (warp + i * S::kWarps) * 16;
    if (first >= tokens) break;
    float out[D / 8][4] = {}, shift[2] = {-kInfinity, -kInfinity}, sum[2] = {0, 0};
    const SharedStrip<T, D> strip{queries, first};
    add_part<T, D, kBelow, 0, S::kPart>(out, shift, sum, strip, keys, values, tokens, scale_log2);
    if constexpr (S::kPart < kTiles) {
      __syncwarp();  // or the second part's keys would be loaded before there are registers for them
      add_part<T, D, kBelow, S::kPart, kTiles - S::kPart>(out, shift, sum, strip, keys, values, tokens, scale_log2);
    }
    const float inverse[2] = {reciprocal(quad_sum(sum[0])), reciprocal(quad_sum(sum[1]))};
    store_strip<T, D>(to, first, tokens, out, inverse);
  }
}

template <int D, int kTiles>
struct BackwardShape {
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kMatrix = kRows * D;
  // Strips of 16 queries, and of 16 keys, per warp. Two share what is read of the other side.
  static constexpr int kStrips = kTiles == 7 || kTiles == 13 ? 2 : 1;
  static constexpr int kWarps = (kTiles + kStrips - 1) / kStrips;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr size_t kBytes = size_t{2} * (4 * kMatrix + kRows * kWeightPitch<kTiles>);
  // Blocks per SM: by Hopper's 227 KiB of shared memory, and by registers, of which 16 warps get 128 each, 8 255.
  static constexpr int kByBytes = static_cast<int>(227 * 1024 / (kBytes + 1024));
  static constexpr int kByRegisters = (kStrips == 2 ? 8 : 16) / kWarps;
  static constexpr int kBlocks = kByRegisters == 0 ? 1 : kByBytes < kByRegisters ? kByBytes : kByRegisters;
};

// What a warp does for its strips of one head. Rows are queries where it has weights and their gradients in registers,
// and keys where it takes columns of them from shared memory: nothing else N x N is there.
template <class T, int D, int kBelow, int kTiles>
struct HeadBackward {
  using S = BackwardShape<D, kTiles>;
  static constexpr int kPitch = kWeightPitch<kTiles>;
  using Grads = float[S::kStrips][D / 8][4];

  const int warp, tokens;
  const float scale_log2;
  T *const queries, *const keys, *const values, *const grads, *const exchanged;

  __device__ int tiles() const { return (tokens + 15) / 16; }
  __device__ static bool beyond(int tile, int tiles) { return tile > kBelow && tile >= tiles; }
  // The first row of a strip; a warp without a second strip repeats its first, for nothing.
  __device__ int first(int strip) const {
    const int own = warp * 16, other = own + strip * S::kWarps * 16;
    return other < tokens ? other : own;
  }
  __device__ bool present(int strip) const {
    return (warp + strip * S::kWarps) * 16 < tokens;
  }
  __device__ T* weights_of(int strip) const { return exchanged + recomputed(first(strip)) * kPitch; }
  // 16 queries' weights, or the gradients of their scores, as left operands.
  using Operands = uint32_t[kTiles][4];

  __device__ void exchange(int strip, const Operands& operands) const {
    T* const to = weights_of(strip);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (beyond(tile, tiles())) break;
      store_operand(to + tile * 16, kPitch, operands[tile]);
    }
  }

  // The softmax of a strip's scores.
  __device__ void weigh(Operands& weights, const Strip<D>& my_queries) const {
    Scores<kTiles> scores = {};
    multiply_transposed<T, D, kBelow + 1>(scores, my_queries, keys, tiles(), sign_of(scale_log2));
    hide_from<kBelow>(tokens, scores);
    softmax<T>(weights, scores, fabsf(scale_log2));
  }

  // Queries that are not there weigh nothing, even where a key is infinite.
  __device__ void clear_beyond(int strip) const {
    const int lane = threadIdx.x % kWarp, columns = 2 * kTiles;
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < (first(strip) + 16 - tokens) * columns; i += kWarp)
      *reinterpret_cast<Vector<T>*>(exchanged + (tokens + i / columns) * kPitch + i % columns * 8) = {};
  }

  // The gradients of a strip's scores, but for `scale`: weight * (its gradient - delta), delta the row's mean of them.
  // The weights come out of `exchanged` twice: registers are not enough to keep them.
  __device__ void differentiate(Operands& grad_scores, int strip) const {
    Scores<kTiles> grad_weights = {};
    const SharedStrip<T, D> my_grads{grads, recomputed(first(strip))};
    multiply_transposed<T, D, kBelow + 1>(grad_weights, my_grads, values, tiles());
    const SharedOperands<T> weights{weights_of(strip), kPitch};
    float delta[2] = {0, 0};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (beyond(tile, tiles())) break;
      uint32_t both[4];
      weights.load(both, tile);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&four)[4] = grad_weights[tile][i / 2];
        delta[i % 2] = fmaf(low<T>(both[i]), four[i % 2 * 2], delta[i % 2]);
        delta[i % 2] = fmaf(high<T>(both[i]), four[i % 2 * 2 + 1], delta[i % 2]);
      }
    }
    delta[0] = quad_sum(delta[0]);
    delta[1] = quad_sum(delta[1]);
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (beyond(tile, tiles())) break;
      uint32_t both[4];
      weights.load(both, tile);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&four)[4] = grad_weights[tile][i / 2];
        grad_scores[tile][i] = pack<T>(low<T>(both[i]) * (four[i % 2 * 2] - delta[i % 2]),
                                       high<T>(both[i]) * (four[i % 2 * 2 + 1] - delta[i % 2]));
      }
    }
  }

  // product += (this warp's columns of `exchanged`)^T matrix
  __device__ void multiply_columns(Grads& product, const T* matrix) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (beyond(tile, tiles())) break;
      uint32_t columns[S::kStrips][4];
#pragma unroll
      for (int strip = 0; strip < S::kStrips; ++strip)
        load_columns<T, kTiles>(columns[strip], exchanged, tile * 16, first(strip));
      multiply<T, D>(product, columns, matrix, tile * 16);
    }
  }

  __device__ void store(const HeadRows<T>& to, const Grads& product, float scale) const {
    const float factor[2] = {scale, scale};
#pragma unroll
    for (int strip = 0; strip < S::kStrips; ++strip)
      if (present(strip)) store_strip<T, D>(to, first(strip), tokens, product[strip], factor);
  }
};

// A block works through heads: the next head's rows arrive while this one's last gradients are computed.
template <class T, int D, int kBelow, int kTiles>
__global__ void __launch_bounds__(BackwardShape<D, kTiles>::kThreads, BackwardShape<D, kTiles>::kBlocks)
    attention_head_backward_kernel(const AttentionBackward p, const float scale_log2) {
  using S = BackwardShape<D, kTiles>;
  T* const shared = shared_memory<T>();
  using Mine = HeadBackward<T, D, kBelow, kTiles>;
  const Mine my{warp_index(), static_cast<int>(p.tokens), scale_log2, shared, shared + S::kMatrix,
                shared + 2 * S::kMatrix, shared + 3 * S::kMatrix, shared + 4 * S::kMatrix};
  const unsigned heads = static_cast<unsigned>(p.batch * p.heads);
  const float scale = static_cast<float>(p.scale);
  auto bring_part = [&](T* matrix, Part part, const Owner& owner) {
    bring<T, D, S::kRows, S::kThreads>(matrix, rows_of<T>(p, part, owner), my.tokens, threadIdx.x);
  };
  auto bring_grads = [&](const Owner& owner) {
    bring<T, D, S::kRows, S::kThreads>(my.grads, grad_out_rows<T>(p, owner), my.tokens, threadIdx.x);
  };
  Strip<D> my_queries[S::kStrips];
  auto load_queries = [&](const Owner& owner) {
#pragma unroll
    for (int strip = 0; strip < S::kStrips; ++strip)
      if (my.present(strip)) my_queries[strip].load(rows_of<T>(p, kQuery, owner), my.first(strip), my.tokens);
  };

  const Owner begin(p, blockIdx.x);
  bring_part(my.keys, kKey, begin);
  bring_part(my.values, kValue, begin);
  bring_grads(begin);
  copy_async_commit();
  load_queries(begin);
#pragma unroll 1
  for (unsigned index = blockIdx.x; index < heads; index += gridDim.x) {
    const bool last = heads - index <= gridDim.x;
    const Owner owner(p, index), next(p, index + gridDim.x);
    copy_async_wait<0>();
    __syncthreads();  // keys, values, grads are here; nobody reads the last head's queries any more
    bring_part(my.queries, kQuery, owner);
    copy_async_commit();
    typename Mine::Operands grad_scores[S::kStrips] = {};
#pragma unroll
    for (int strip = 0; strip < S::kStrips; ++strip) {
      if (!my.present(strip)) continue;
      {
        typename Mine::Operands weights;
        my.weigh(weights, my_queries[strip]);
        my.exchange(strip, weights);
        my.clear_beyond(strip);
      }
      __syncwarp();
      my.differentiate(grad_scores[strip], strip);
    }
    __syncthreads();  // all weights are written; nobody reads the values any more
    if (!last) bring_part(my.values, kValue, next);
    copy_async_commit();
    if (my.present(0)) {
      float grad_value[S::kStrips][D / 8][4] = {};
      my.multiply_columns(grad_value, my.grads);
      my.store(grad_rows<T, D>(p, kValue, owner), grad_value, 1);
      __syncwarp();  // or the keys would be loaded before there are registers for them
      float grad_query[S::kStrips][D / 8][4] = {};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (my.beyond(tile, my.tiles())) break;
        uint32_t operands[S::kStrips][4];
#pragma unroll
        for (int i = 0; i < 4 * S::kStrips; ++i) operands[i / 4][i % 4] = grad_scores[i / 4][tile][i % 4];
        multiply<T, D>(grad_query, operands, my.keys, tile * 16);
      }
      my.store(grad_rows<T, D>(p, kQuery, owner), grad_query, scale);
    }
    __syncthreads();  // nobody reads weights, keys or grads any more
    if (!last) {
      bring_part(my.keys, kKey, next);
      bring_grads(next);
    }
    copy_async_commit();
#pragma unroll
    for (int strip = 0; strip < S::kStrips; ++strip)
      if (my.present(strip)) my.exchange(strip, grad_scores[strip]);
    copy_async_wait<2>();
    __syncthreads();  // all scores' gradients are written; the queries are here
    if (!last) load_queries(next);
    if (my.present(0)) {
      float grad_key[S::kStrips][D / 8][4] = {};
      my.multiply_columns(grad_key, my.queries);
      my.store(grad_rows<T, D>(p, kKey, owner), grad_key, scale);
    }
  }
}

template <class T, int D, int kBelow, int kTiles>
bool queue(const Attention& p, float scale_log2, void* stream, const char*& error) {
  using S = ForwardShape<D, kTiles>;
  if (S::kBytes > static_cast<size_t>(max_shared_bytes())) return false;
  const int64_t blocks = (p.batch * p.heads + S::kHeads - 1) / S::kHeads;
  error = launch(attention_head_forward_kernel<T, D, kBelow, kTiles>, blocks, S::kThreads, S::kBytes, stream, p,
                 scale_log2);
  return true;
}

template <class T, int D, int kBelow, int kTiles>
bool queue(const AttentionBackward& p, float scale_log2, void* stream, const char*& error) {
  using S = BackwardShape<D, kTiles>;
  if (S::kBytes > static_cast<size_t>(max_shared_bytes())) return false;
  const auto kernel = attention_head_backward_kernel<T, D, kBelow, kTiles>;
  error = launch_at_once(kernel, p.batch * p.heads, S::kThreads, S::kBytes, stream, p, scale_log2);
  return true;
}

struct Queue {
  template <class T, int D, int kBelow, int kTiles, class Problem>
  static bool run(const Problem& p, float scale_log2, void* stream, const char*& error) {
    return queue<T, D, kBelow, kTiles>(p, scale_log2, stream, error);
  }
};

using ForwardSizes = Sizes<2, 4, 5, 7, 10, 13, 17>;
using BackwardSizes = Sizes<2, 4, 5, 7, 10, 13>;

}  // namespace

bool queue_head(const Attention& p, void* stream, const char*& error) {
  return queue_sizes<Queue, ForwardSizes>(p, stream, error);
}
bool queue_head(const AttentionBackward& p, void* stream, const char*& error) {
  return queue_sizes<Queue, BackwardSizes>(p, stream, error);
}

}  // namespace vitkd::cuda
