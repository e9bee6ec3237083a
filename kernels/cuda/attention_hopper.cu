// Self-attention of whole heads on Hopper: as attention_head.cu does it, but four warps multiply at once, with operands
// that tensor cores read from shared memory themselves. See README.md.
#include "sizes.cuh"
#include "warpgroup.cuh"

namespace vitkd::cuda {
namespace {

constexpr int kBlockRows = 64;  // of a product

template <int kCount, class Accumulator>
__device__ __forceinline__ float (&flat(Accumulator& accumulator))[kCount] {
  static_assert(sizeof(Accumulator) == kCount * sizeof(float));
  return reinterpret_cast<float(&)[kCount]>(accumulator);
}

// The name of a matrix in shared memory, and of what lies `elements` on: 16 columns of its rows, or whole groups of 8 rows.
template <int D, class T>
__device__ __forceinline__ uint64_t name_of(const T* matrix) {
  return matrix_descriptor<D>(shared_address(matrix));
}
__device__ constexpr uint64_t further(int elements) { return elements * 2 / 16; }

// c = the sum of the products that `issue(k)` starts for each k below kCount, waited for.
template <int kCount, int kRegisters, class Issue>
__device__ __forceinline__ void sum_products(float (&c)[kRegisters], Issue issue) {
  pin(c);
  warpgroup_begin();
#pragma unroll
  for (int k = 0; k < kCount; ++k) issue(k);
  warpgroup_commit();
  warpgroup_wait<0>();
  pin(c);
}

// product (64 x 16*kTiles) = left right^T, of 64 rows from `left` on.
template <class T, int D, int kTiles>
__device__ __forceinline__ void multiply_by_rows(Scores<kTiles>& product, const T* left, const T* right) {
  auto& c = flat<8 * kTiles>(product);
  const uint64_t a = name_of<D>(left), b = name_of<D>(right);
  sum_products<D / 16>(c, [&](int k) {
    WarpgroupProduct<T, kTiles>::template run<false, false>(c, a + further(k * 16), b + further(k * 16), k > 0);
  });
}

// What this thread has asked to be copied, but for the last kPending groups, and what all have written is there for products.
template <int kPending>
__device__ __forceinline__ void await_all_but() {
  copy_async_wait<kPending>();
  publish_to_warpgroups();
  __syncthreads();
}

// The largest score must be the largest logit: where `scale` is negative, all change their signs.
template <int kTiles>
__device__ __forceinline__ void turn(Scores<kTiles>& scores, float scale) {
  if (scale >= 0) return;
#pragma unroll
  for (int i = 0; i < 8 * kTiles; ++i) scores[i / 8][i / 4 % 2][i % 4] = -scores[i / 8][i / 4 % 2][i % 4];
}

template <int D, int kTiles>
struct HopperForwardShape {
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kMatrix = kRows * D;
  // Groups of four warps, each taking every so manieth block of queries, and blocks per SM, as many as there is shared memory
  // for: 16 warps of an SM get 128 registers each, 20 get 96.
  static constexpr int kGroups = kTiles > 7 ? 2 : 1;
  static constexpr int kBlocks = kTiles > 7 ? 2 : 5;
  static constexpr int kThreads = kGroups * kWarpgroup;
  static constexpr size_t kBytes = size_t{2} * 3 * kMatrix;
  // Scores in registers at a time, of a row that is too long for them all.
  static constexpr int kParts = (kTiles + 4) / 5, kPart = (kTiles + kParts - 1) / kParts;
};

// 64 queries' softmax and output, and how a part of the keys is added to them.
template <class T, int D, int kBelow, int kTiles>
struct HopperForward {
  using S = HopperForwardShape<D, kTiles>;
  const T *const queries, *const keys, *const values;
  const int tokens;
  const float scale_log2;
  float out[D / 8][4], shift[2], sum[2];

  // This warp's queries are `present`, or nobody wants what comes out. `await_values` returns when they are there.
  template <int kFirst, class AwaitValues>
  __device__ __forceinline__ void add(bool present, AwaitValues await_values) {
    constexpr int kPart = S::kPart < kTiles - kFirst ? S::kPart : kTiles - kFirst;
    constexpr int kFull = kBelow - kFirst;
    const float factor = fabsf(scale_log2);
    uint32_t weights[kPart][4] = {};
    {
      Scores<kPart> scores;
      multiply_by_rows<T, D>(scores, queries, keys + kFirst * 16 * D);
      if (present) {
        turn(scores, scale_log2);
        if constexpr (kFull < kPart) hide_from<(kFull > 0 ? kFull : 0)>(tokens - kFirst * 16, scores);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float now = raise<(kFirst > 0)>(scores, row, factor, shift, sum, out);
          // One fma is as good only where the largest weight rounds to 1 all the same.
          constexpr bool kFused = std::is_same_v<T, bfloat16>;
          const float scaled = fmaxf(now * factor, kLowest);
          const auto weight = [&](float score) {
            return fast_exp2(kFused ? fmaf(score, factor, -scaled) : (score - now) * factor);
          };
#pragma unroll
          for (int i = 0; i < 2 * kPart; ++i) {
            const float (&four)[4] = scores[i / 2][i % 2];
            const float left = weight(four[2 * row]), right = weight(four[2 * row + 1]);
            sum[row] += left;
            sum[row] += right;
            weights[i / 2][i % 2 * 2 + row] = pack<T>(left, right);
          }
        }
      }
    }
    await_values();
    auto& c = flat<D / 2>(out);
    const uint64_t b = name_of<D>(values + kFirst * 16 * D);
    sum_products<kPart>(c, [&](int tile) {
      WarpgroupProduct<T, D / 16>::template run<true>(c, weights[tile], b + further(tile * 16 * D), kFirst + tile > 0);
    });
    if constexpr (kFirst + kPart < kTiles) add<kFirst + kPart>(present, [] {});
  }
};

// A block is one head of more than 16 * kBelow tokens and at most 16 * kTiles, and goes through it by 64 queries.
template <class T, int D, int kBelow, int kTiles>
__global__ void __launch_bounds__(HopperForwardShape<D, kTiles>::kThreads, HopperForwardShape<D, kTiles>::kBlocks)
    attention_hopper_forward_kernel(const Attention p, const float scale_log2) {
  if (!warpgroups()) return;
  using S = HopperForwardShape<D, kTiles>;
  const int warp = warp_index() % 4, group = warp_index() / 4, tokens = static_cast<int>(p.tokens);
  const Owner owner(p, blockIdx.x);
  // Queries come first: products read up to 48 rows beyond their last, which must be in shared memory.
  T* const queries = shared_memory<T>();
  T *const keys = queries + S::kMatrix, *const values = keys + S::kMatrix;
  const auto bring_part = [&](T* matrix, Part part) {
    bring<T, D, S::kRows, S::kThreads>(matrix, rows_of<T>(p, part, owner), tokens, threadIdx.x);
  };
  bring_part(queries, kQuery);
  bring_part(keys, kKey);
  copy_async_commit();
  bring_part(values, kValue);
  copy_async_commit();
  await_all_but<1>();

  T* const data = static_cast<T*>(p.out) + (owner.batch * p.tokens * p.heads + owner.head) * D;
  const HeadRows<T> to{data, static_cast<int>(p.heads) * D};
#pragma unroll 1
  for (int block = group; block * kBlockRows < tokens; block += S::kGroups) {
    const int first = block * kBlockRows + warp * 16;
    const bool present = first < tokens;
    HopperForward<T, D, kBelow, kTiles> my{
        queries + block * kBlockRows * D, keys, values, tokens, scale_log2, {}, {-kInfinity, -kInfinity}, {0, 0}};
    my.template add<0>(present, [&] {
      if (block == group) await_all_but<0>();  // every group has such a block
    });
    if (!present) continue;
    const float inverse[2] = {reciprocal(quad_sum(my.sum[0])), reciprocal(quad_sum(my.sum[1]))};
    store_strip<T, D>(to, first, tokens, my.out, inverse);
  }
}

template <int D, int kTiles>
struct HopperBackwardShape {
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kMatrix = kRows * D;
  static constexpr int kGroups = 2;  // of four warps, each taking every second block of rows
  static constexpr int kThreads = kGroups * kWarpgroup;
  static constexpr int kBlocks = (kRows + kBlockRows - 1) / kBlockRows;
  static constexpr int kColumns = kRows * kBlockRows;  // of the exchange: 64 columns of all rows
  static constexpr size_t kBytes = size_t{2} * (4 * kMatrix + kBlocks * kColumns);
};

// What four warps do for blocks of 64 queries, or keys, of one head. Weights, and then the gradients of the scores, are
// exchanged through shared memory, which has them by 64 keys.
template <class T, int D, int kBelow, int kTiles>
struct HopperBackward {
  using S = HopperBackwardShape<D, kTiles>;
  using Operands = uint32_t[kTiles][4];

  const int group, warp, tokens;
  const float scale_log2;
  T *const exchanged, *const grads, *const queries, *const keys, *const values;

  // The first of this warp's 16 rows in a block.
  __device__ int first(int block) const { return block * kBlockRows + warp * 16; }
  __device__ bool there(int block) const { return block < S::kBlocks && block * kBlockRows < tokens; }

  // Where a lane has its row of an 8x8 matrix, of the four of a tile of 16 keys.
  __device__ T* exchanged_row(int row, int tile) const {
    const int lane = threadIdx.x % kWarp;
    return exchanged + tile / 4 * S::kColumns + swizzled<64>(row + lane % 16, tile % 4 * 16 + lane / 16 * 8);
  }
  __device__ __forceinline__ void exchange(const Operands& operands, int row) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) store_matrices(exchanged_row(row, tile), operands[tile]);
  }

  // Queries that are not there weigh nothing, even where a key is infinite.
  __device__ __forceinline__ void clear_beyond(Operands& operands, int row) const {
    if (row + 16 <= tokens) return;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i)
      if (row + accumulator_row(threadIdx.x % kWarp, i % 2 * 2) >= tokens) operands[i / 4][i % 4] = 0;
  }

  // The softmax of 64 queries' scores.
  __device__ __forceinline__ void weigh(const Strip<D>& my_queries, int block) const {
    const int row = first(block);
    Operands weights;
    Scores<kTiles> scores;
    auto& c = flat<8 * kTiles>(scores);
    const uint64_t b = name_of<D>(keys);
    sum_products<D / 16>(c, [&](int k) {
      WarpgroupProduct<T, kTiles>::template run<false>(c, my_queries.registers[k], b + further(k * 16), k > 0);
    });
    hide_from<kBelow>(tokens, scores);
    softmax<T>(weights, scores, fabsf(scale_log2));
    clear_beyond(weights, row);
    if (row < S::kRows) exchange(weights, row);
  }

  // From the weights of 64 queries the gradients of their scores, but for `scale`: weight * (its gradient - delta), delta
  // the row's mean of them.
  __device__ __forceinline__ void differentiate(int block) const {
    const int row = first(block);
    Scores<kTiles> grad_weights;
    multiply_by_rows<T, D>(grad_weights, grads + block * kBlockRows * D, values);
    if (row >= S::kRows) return;
    Operands weights;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) load_matrices<false>(weights[tile], exchanged_row(row, tile));
    float delta[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const float (&four)[4] = grad_weights[i / 4][i % 4 / 2];
      const uint32_t both = weights[i / 4][i % 4];
      delta[i % 2] = fmaf(low<T>(both), four[i % 2 * 2], delta[i % 2]);
      delta[i % 2] = fmaf(high<T>(both), four[i % 2 * 2 + 1], delta[i % 2]);
    }
    delta[0] = quad_sum(delta[0]);
    delta[1] = quad_sum(delta[1]);
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) {
      const float (&four)[4] = grad_weights[i / 4][i % 4 / 2];
      uint32_t& both = weights[i / 4][i % 4];
      both = pack<T>(low<T>(both) * (four[i % 2 * 2] - delta[i % 2]),
                     high<T>(both) * (four[i % 2 * 2 + 1] - delta[i % 2]));
    }
    clear_beyond(weights, row);
    __syncwarp();
    exchange(weights, row);
  }

  // 64 rows of exchanged matrix, or 64 rows of exchanged^T matrix.
  template <bool kTransposed>
  __device__ __forceinline__ void multiply_store(const HeadRows<T>& to, int block, const T* matrix, float scale) const {
    float product[D / 8][4];
    auto& c = flat<D / 2>(product);
    const uint64_t a = name_of<64>(exchanged + (kTransposed ? block * S::kColumns : block * kBlockRows * 64));
    const uint64_t b = name_of<D>(matrix);
    sum_products<kTiles>(c, [&](int tile) {
      const int step = kTransposed ? tile * 16 * 64 : tile / 4 * S::kColumns + tile % 4 * 16;
      WarpgroupProduct<T, D / 16>::template run<kTransposed, true>(c, a + further(step), b + further(tile * 16 * D),
                                                                   tile > 0);
    });
    const float factor[2] = {scale, scale};
    if (first(block) < tokens) store_strip<T, D>(to, first(block), tokens, product, factor);
  }
};

// A block works through heads: the next head's rows arrive while this one's last gradients are computed.
template <class T, int D, int kBelow, int kTiles>
__global__ void __launch_bounds__(HopperBackwardShape<D, kTiles>::kThreads, 1)
    attention_hopper_backward_kernel(const AttentionBackward p, const float scale_log2) {
  if (!warpgroups()) return;
  using S = HopperBackwardShape<D, kTiles>;
  // Products read up to 48 rows beyond the exchange's and the gradients' last, which must be in shared memory.
  T* const exchanged = shared_memory<T>();
  T* const matrices = exchanged + S::kBlocks * S::kColumns;
  const HopperBackward<T, D, kBelow, kTiles> my{
      warp_index() / 4,       warp_index() % 4,        static_cast<int>(p.tokens), scale_log2,
      exchanged,              matrices,                matrices + S::kMatrix,      matrices + 2 * S::kMatrix,
      matrices + 3 * S::kMatrix};
  const unsigned heads = static_cast<unsigned>(p.batch * p.heads);
  const float scale = static_cast<float>(p.scale);
  const auto bring_rows = [&](T* matrix, const HeadRows<const T>& rows) {
    bring<T, D, S::kRows, S::kThreads>(matrix, rows, my.tokens, threadIdx.x);
  };
  const auto bring_values_and_grads = [&](const Owner& owner) {
    bring_rows(my.values, rows_of<T>(p, kValue, owner));
    bring_rows(my.grads, grad_out_rows<T>(p, owner));
  };
  constexpr int kTurns = (S::kBlocks + S::kGroups - 1) / S::kGroups;
  Strip<D> my_queries[kTurns];
  const auto load_queries = [&](const Owner& owner) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      my_queries[turn].load(rows_of<T>(p, kQuery, owner), my.first(my.group + turn * S::kGroups), my.tokens);
#pragma unroll
      for (int i = 0; i < D / 4; ++i) my_queries[turn].registers[i / 4][i % 4] ^= sign_of(scale_log2);
    }
  };
  const auto exchange_done = [] {
    publish_to_warpgroups();
    __syncthreads();
  };

  const Owner begin(p, blockIdx.x);
  bring_values_and_grads(begin);
  copy_async_commit();
  bring_rows(my.keys, rows_of<T>(p, kKey, begin));
  copy_async_commit();
  bring_rows(my.queries, rows_of<T>(p, kQuery, begin));
  copy_async_commit();
  load_queries(begin);
#pragma unroll 1
  for (unsigned index = blockIdx.x; index < heads; index += gridDim.x) {
    const Owner owner(p, index), next(p, index + gridDim.x);
    const bool last = index + gridDim.x >= heads;
    await_all_but<1>();  // all but the queries
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int block = my.group + turn * S::kGroups;
      if (block < S::kBlocks) my.weigh(my_queries[turn], block);  // zeros where no query is
    }
    exchange_done();  // of weights
#pragma unroll 1
    for (int block = my.group; my.there(block); block += S::kGroups)
      my.template multiply_store<true>(grad_rows<T, D>(p, kValue, owner), block, my.grads, 1);
    __syncthreads();  // nobody reads weights any more
#pragma unroll 1
    for (int block = my.group; block < S::kBlocks; block += S::kGroups) my.differentiate(block);
    await_all_but<0>();  // of scores' gradients; the queries are here
    if (!last) bring_values_and_grads(next);
    copy_async_commit();
#pragma unroll 1
    for (int block = my.group; my.there(block); block += S::kGroups)
      my.template multiply_store<false>(grad_rows<T, D>(p, kQuery, owner), block, my.keys, scale);
    __syncthreads();  // nobody reads keys any more
    if (!last) {
      bring_rows(my.keys, rows_of<T>(p, kKey, next));
      load_queries(next);
    }
    copy_async_commit();
#pragma unroll 1
    for (int block = my.group; my.there(block); block += S::kGroups)
      my.template multiply_store<true>(grad_rows<T, D>(p, kKey, owner), block, my.queries, scale);
    __syncthreads();  // nobody reads queries, or the exchange, any more
    if (!last) bring_rows(my.queries, rows_of<T>(p, kQuery, next));
    copy_async_commit();
  }
  copy_async_wait<0>();
}

struct HopperQueue {
  template <class T, int D, int kBelow, int kTiles>
  static bool run(const Attention& p, float scale_log2, void* stream, const char*& error) {
    if constexpr (kTiles < 4) return false;  // 64 queries at a time are too many
    else {
      using S = HopperForwardShape<D, kTiles>;
      const auto kernel = attention_hopper_forward_kernel<T, D, kBelow, kTiles>;
      error = launch(kernel, p.batch * p.heads, S::kThreads, S::kBytes, stream, p, scale_log2);
      return true;
    }
  }

  template <class T, int D, int kBelow, int kTiles>
  static bool run(const AttentionBackward& p, float scale_log2, void* stream, const char*& error) {
    if constexpr (kTiles < 13) return false;
    else {
      using S = HopperBackwardShape<D, kTiles>;
      const auto kernel = attention_hopper_backward_kernel<T, D, kBelow, kTiles>;
      error = launch_at_once(kernel, S::kThreads, S::kBytes, stream, p, scale_log2);
      return true;
    }
  }
};

using HopperForwardSizes = Sizes<2, 4, 5, 7, 10, 13, 17>;
using HopperBackwardSizes = Sizes<10, 13>;

}  // namespace

bool queue_hopper(const Attention& p, void* stream, const char*& error) {
  return has_warpgroups() && queue_sizes<HopperQueue, HopperForwardSizes>(p, stream, error);
}
bool queue_hopper(const AttentionBackward& p, void* stream, const char*& error) {
  return has_warpgroups() && queue_sizes<HopperQueue, HopperBackwardSizes>(p, stream, error);
}

}  // namespace vitkd::cuda
