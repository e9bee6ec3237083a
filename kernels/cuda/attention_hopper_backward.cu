// The gradient of self-attention of whole heads on Hopper, by products of four warps. See README.md.
#include "hopper.cuh"
#include "sizes.cuh"

namespace vitkd::cuda {
namespace {

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
    const auto b = name_of<D>(keys);
    sum_products<D / 16>(c, [&](int k) {
      WarpgroupProduct<T, kTiles>::template run<false>(c, my_queries.registers[k], b.further(k * 16), k > 0);
    });
    hide_from<kBelow>(tokens, scores);
    softmax<T>(weights, scores, fabsf(scale_log2));
    clear_beyond(weights, row);
    if (row < S::kRows) exchange(weights, row);
  }

  // From the weights of 64 queries the gradients of their scores, but for `scale`: weight * (its gradient - delta),
  // delta the row's mean of them.
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
    const auto a = name_of<64>(exchanged + (kTransposed ? block * S::kColumns : block * kBlockRows * 64));
    const auto b = name_of<D>(matrix);
    sum_products<kTiles>(c, [&](int tile) {
      const int step = kTransposed ? tile * 16 * 64 : tile / 4 * S::kColumns + tile % 4 * 16;
      WarpgroupProduct<T, D / 16>::template run<kTransposed, true>(c, a.further(step), b.further(tile * 16 * D),
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

struct HopperBackwardQueue {
  template <class T, int D, int kBelow, int kTiles>
  static bool run(const AttentionBackward& p, float scale_log2, void* stream, const char*& error) {
    if constexpr (kTiles < 13) return false;
    else {
      using S = HopperBackwardShape<D, kTiles>;
      const auto kernel = attention_hopper_backward_kernel<T, D, kBelow, kTiles>;
      error = launch_at_once(kernel, p.batch * p.heads, S::kThreads, S::kBytes, stream, p, scale_log2);
      return true;
    }
  }
};

}  // namespace

bool queue_hopper(const AttentionBackward& p, void* stream, const char*& error) {
  return has_warpgroups() && queue_sizes<HopperBackwardQueue, Sizes<10, 13>>(p, stream, error);
}

}  // namespace vitkd::cuda
