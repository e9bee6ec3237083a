// Self-attention of whole heads on Hopper: as attention_head.cu does it, but four warps multiply at once, with operands
// that tensor cores read from shared memory themselves. See README.md.
#include "bulk.cuh"
#include "hopper.cuh"
#include "sizes.cuh"

namespace vitkd::cuda {
namespace {

// The largest score must be the largest logit: where `scale` is negative, all change their signs.
template <int kTiles>
__device__ __forceinline__ void turn(Scores<kTiles>& scores, float scale) {
  if (scale >= 0) return;
#pragma unroll
  for (int i = 0; i < 8 * kTiles; ++i) scores[i / 8][i / 4 % 2][i % 4] = -scores[i / 8][i / 4 % 2][i % 4];
}

// A row of scores goes through registers in parts. How many tiles the part has whose first is `first`.
template <int kTiles>
struct HopperParts {
  static constexpr int kParts = kTiles == 13 ? 3 : kTiles > 7 ? 2 : 1;
  __host__ __device__ static constexpr int part(int first) {
    constexpr int kMost = (kTiles + kParts - 1) / kParts;
    return kMost < kTiles - first ? kMost : kTiles - first;
  }
};

// 64 queries' softmax and output, and how a part of the keys is added to them.
template <class T, int D, int kBelow, int kTiles>
struct HopperForward {
  using S = HopperParts<kTiles>;
  const Name<D> queries, keys, values;
  const int tokens;
  const float scale_log2;
  float out[D / 8][4], shift[2], sum[2];

  template <int kFirst>
  __device__ __forceinline__ void start_scores(Scores<S::part(kFirst)>& scores) {
    constexpr int kCount = S::part(kFirst);
    auto& c = flat<8 * kCount>(scores);
    const auto b = keys.further(kFirst * 16 * D);
    start_products<D / 16>(c, [&](int k) {
      WarpgroupProduct<T, kCount>::template run<false, false>(c, queries.further(k * 16), b.further(k * 16), k > 0);
    });
  }

  template <int kFirst>
  __device__ __forceinline__ void weigh_part(uint32_t (&weights)[S::part(kFirst)][4], Scores<S::part(kFirst)>& scores) {
    constexpr int kFull = kBelow - kFirst;
    turn(scores, scale_log2);
    if constexpr (kFull < S::part(kFirst)) hide_from<(kFull > 0 ? kFull : 0)>(tokens - kFirst * 16, scores);
    weigh<T, (kFirst > 0), std::is_same_v<T, bfloat16>>(weights, scores, fabsf(scale_log2), shift, sum, out);
  }

  template <int kFirst>
  __device__ __forceinline__ void start_output(const uint32_t (&weights)[S::part(kFirst)][4]) {
    auto& c = flat<D / 2>(out);
    const auto b = values.further(kFirst * 16 * D);
    start_products<S::part(kFirst)>(c, [&](int tile) {
      WarpgroupProduct<T, D / 16>::template run<true>(c, weights[tile], b.further(tile * 16 * D), kFirst + tile > 0);
    });
  }

  // The scores of the keys from kFirst tiles on are there.
  template <int kFirst, class AwaitValues>
  __device__ __forceinline__ void add(bool present, AwaitValues await_values, Scores<S::part(kFirst)>& scores) {
    constexpr int kNext = kFirst + S::part(kFirst);
    uint32_t weights[S::part(kFirst)][4] = {};
    if (present) weigh_part<kFirst>(weights, scores);
    if (kFirst == 0) await_values();
    start_output<kFirst>(weights);
    if constexpr (kNext < kTiles) {
      Scores<S::part(kNext)> next;
      start_scores<kNext>(next);
      warpgroup_wait<0>();
      pin(flat<D / 2>(out));
      pin(flat<8 * S::part(kNext)>(next));
      add<kNext>(present, await_values, next);
    } else {
      warpgroup_wait<0>();
      pin(flat<D / 2>(out));
    }
  }

  // This warp's queries are `present`, or nobody wants what comes out. `await_values` returns when they are there.
  template <class AwaitValues>
  __device__ __forceinline__ void run(bool present, AwaitValues await_values) {
    Scores<S::part(0)> scores;
    start_scores<0>(scores);
    warpgroup_wait<0>();
    pin(flat<8 * S::part(0)>(scores));
    add<0>(present, await_values, scores);
  }

  // This warp's queries are the head's from `first` on.
  __device__ __forceinline__ void store(const HeadRows<T>& to, int first) const {
    const float inverse[2] = {reciprocal(quad_sum(sum[0])), reciprocal(quad_sum(sum[1]))};
    store_strip<T, D>(to, first, tokens, out, inverse);
  }
};

template <int D, int kTiles>
struct HopperShortShape {
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kMatrix = kRows * D;
  static constexpr size_t kBytes = size_t{2} * 3 * kMatrix;
  static_assert(kRows <= kBlockRows);
};

// A block is one head of more than 16 * kBelow tokens and at most 64, of which an SM has five: that is faster than one
// block which works through them.
template <class T, int D, int kBelow, int kTiles>
__global__ void __launch_bounds__(kWarpgroup, 5)
    attention_hopper_short_kernel(const Attention p, const float scale_log2) {
  if (!warpgroups()) return;
  using S = HopperShortShape<D, kTiles>;
  const int tokens = static_cast<int>(p.tokens), first = warp_index() * 16;
  const bool present = first < tokens;
  const Owner owner(p, blockIdx.x);
  T* const queries = shared_memory<T>();
  T *const keys = queries + S::kMatrix, *const values = keys + S::kMatrix;
  const auto bring_part = [&](T* matrix, Part part) {
    bring<T, D, S::kRows, kWarpgroup>(matrix, rows_of<T>(p, part, owner), tokens, threadIdx.x);
  };
  bring_part(queries, kQuery);
  bring_part(keys, kKey);
  copy_async_commit();
  bring_part(values, kValue);
  copy_async_commit();
  await_all_but<1>();
  HopperForward<T, D, kBelow, kTiles> my{
      name_of<D>(queries), name_of<D>(keys), name_of<D>(values), tokens, scale_log2, {},
      {-kInfinity, -kInfinity}, {0, 0}};
  my.run(present, [] { await_all_but<0>(); });
  if (present) my.store(out_rows<T, D>(p, owner), first);
}

// Groups of four warps, and teams of groups that have heads of their own. These and the parts are the fastest of some
// five ways for each length, measured on an H200.
template <int D, int kTiles>
struct HopperForwardShape {
  static constexpr int kGroups = kTiles == 5 || kTiles == 17 ? 3 : 4;
  static constexpr int kTeams = kTiles == 5 ? 3 : kTiles == 7 ? 4 : 1, kTeam = kGroups / kTeams;
  static constexpr int kThreads = kGroups * kWarpgroup;
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kMatrix = kRows * D, kHead = 3 * kMatrix;
  static constexpr int kBoxes = kRows > 256 ? 2 : 1, kBoxRows = kRows / kBoxes;  // the engine brings 256 at a time
  // Heads in shared memory at a time, each with its barrier and its count.
  static constexpr int kHeadBytes = 2 * kHead + sizeof(Barrier) + sizeof(uint32_t);
  static constexpr int kFit = 227 * 1024 / kHeadBytes < 8 ? 227 * 1024 / kHeadBytes : 8;
  static constexpr int kStages = kFit / kTeams * kTeams;
  static constexpr size_t kBytes = size_t{kStages} * kHeadBytes;
};

// A block works through heads of more than 16 * kBelow tokens and at most 16 * kTiles. While its groups are at one,
// each with 64 queries at a time, the next ones arrive; whoever is the last to leave a head asks for another in its
// place.
template <class T, int D, int kBelow, int kTiles>
__global__ void __launch_bounds__(HopperForwardShape<D, kTiles>::kThreads, 1)
    attention_hopper_forward_kernel(const __grid_constant__ RowsMap map, const Attention p, const float scale_log2) {
  if (!warpgroups()) return;
  using S = HopperForwardShape<D, kTiles>;
  const int warp = warp_index() % 4, group = warp_index() / 4, tokens = static_cast<int>(p.tokens);
  const unsigned heads = static_cast<unsigned>(p.batch * p.heads);
  const int blocks = (tokens + kBlockRows - 1) / kBlockRows;
  // Warps that a head's last block leaves idle. The others are not always the same: that block begins early by so many
  // rows as `back` says, which takes turns, or one of an SM's four schedulers would have more to do than the rest.
  const int spare = blocks > 1 ? (blocks * kBlockRows - tokens) / 16 : 0;
  T* const ring = shared_memory<T>();
  auto* const arrived = reinterpret_cast<Barrier*>(ring + S::kStages * S::kHead);
  auto* const left = reinterpret_cast<uint32_t*>(arrived + S::kStages);
  const auto bring_head = [&](int stage, unsigned index) {
    const Owner owner(p, index);
    expect_bytes(arrived + stage, 2 * S::kHead);
#pragma unroll
    for (int part = 0; part < 3; ++part)
#pragma unroll
      for (int box = 0; box < S::kBoxes; ++box)
        bring_rows(ring + stage * S::kHead + part * S::kMatrix + box * S::kBoxRows * D, map, arrived + stage,
                   box * S::kBoxRows, static_cast<Part>(part), owner);
  };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      make_barrier(arrived + stage);
      left[stage] = 0;
    }
    publish_barriers();
    for (unsigned stage = 0, index = blockIdx.x; stage < S::kStages && index < heads; ++stage, index += gridDim.x)
      bring_head(stage, index);
  }
  __syncthreads();

  const int team = group / S::kTeam;
  const unsigned stride = S::kTeams * gridDim.x;
  unsigned index = blockIdx.x + team * gridDim.x;
  Owner owner(p, index);
  const Owner step(p, stride);
  const Name<D> name = name_of<D>(ring);
  int stage = team, first_block = group % S::kTeam, back = 0;  // groups take turns at what is left of a head
  uint32_t parity = 0;
#pragma unroll 1
  for (; index < heads; index += stride) {
    await_phase(arrived + stage, parity);
#pragma unroll 1
    for (int block = first_block; block < blocks; block += S::kTeam) {
      const int begin = block * kBlockRows - (block == blocks - 1 ? 16 * back : 0), first = begin + warp * 16;
      const bool present = block * kBlockRows <= first && first < tokens;
      const Name<D> head = name.further(stage * S::kHead);
      // Products read up to 48 rows beyond the last query, which must be in shared memory: other matrices are.
      HopperForward<T, D, kBelow, kTiles> my{
          head.further(begin * D), head.further(S::kMatrix), head.further(2 * S::kMatrix), tokens, scale_log2, {},
          {-kInfinity, -kInfinity}, {0, 0}};
      my.run(present, [] {});
      if (present) my.store(out_rows<T, D>(p, owner), first);
    }
    __syncwarp();  // a lane may still wait for this very phase where its warp had no block
    if (threadIdx.x % kWarp == 0 && comes_last(left + stage, 4 * S::kTeam)) {
      const uint64_t next = index + uint64_t{S::kStages} * gridDim.x;
      if (next < heads) bring_head(stage, static_cast<unsigned>(next));
    }
    owner.advance(p, step);
    if ((stage += S::kTeams) >= S::kStages) stage -= S::kStages, parity ^= 1;
    if (++first_block == S::kTeam) first_block = 0;
    if (++back > spare) back = 0;
  }
}

struct HopperForwardQueue {
  template <class T, int D, int kBelow, int kTiles>
  static bool run(const Attention& p, float scale_log2, void* stream, const char*& error) {
    const int64_t heads = p.batch * p.heads;
    if constexpr (kTiles < 4) return false;  // 64 queries at a time are too many
    else if constexpr (kTiles == 4) {
      const auto kernel = attention_hopper_short_kernel<T, D, kBelow, kTiles>;
      error = launch(kernel, heads, kWarpgroup, HopperShortShape<D, kTiles>::kBytes, stream, p, scale_log2);
    } else {
      using S = HopperForwardShape<D, kTiles>;
      const auto kernel = attention_hopper_forward_kernel<T, D, kBelow, kTiles>;
      RowsMap map;
      if (!make_rows_map(map, p, S::kBoxRows)) return false;
      error = launch_at_once(kernel, heads, S::kThreads, S::kBytes, stream, map, p, scale_log2);
    }
    return true;
  }
};

}  // namespace

bool queue_hopper(const Attention& p, void* stream, const char*& error) {
  return has_warpgroups() && queue_sizes<HopperForwardQueue, Sizes<2, 4, 5, 7, 10, 13, 17>>(p, stream, error);
}

}  // namespace vitkd::cuda
