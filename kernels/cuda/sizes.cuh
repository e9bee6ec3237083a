// Which of the sizes that whole-head kernels are compiled for takes a problem, if any does.
#pragma once

#include "attention.cuh"

namespace vitkd::cuda {

// The room, in tiles, that is compiled for; a head takes the smallest that holds it. Where they are 2, 4, 5, 7, 10, 13
// and 17, that is for 32, 49 + 1, 64 + 1, 100, 144 + 1, 196 + 2 and 256 + 1 tokens, and what lies between goes along.
template <int... kTiles>
struct Sizes {};

template <class Queue, class T, int D, int kBelow, int kTiles, int... kMore, class Problem, class... More>
bool queue_smallest(Sizes<kTiles, kMore...>, const Problem& p, More&... more) {
  if (p.tokens <= 16 * kTiles) return Queue::template run<T, D, kBelow, kTiles>(p, more...);
  if constexpr (sizeof...(kMore) > 0)
    return queue_smallest<Queue, T, D, kTiles>(Sizes<kMore...>{}, p, more...);
  else
    return false;
}

// Whether the offsets within a head do not take 64 bits.
inline bool fits_int(std::initializer_list<int64_t> row_strides, int64_t tokens) {
  for (int64_t stride : row_strides)
    if (stride * tokens > 2147483647) return false;
  return true;
}
inline bool fits_int(const Attention& p) { return fits_int({p.qkv_stride[1], p.heads * p.head_dim}, p.tokens); }
inline bool fits_int(const AttentionBackward& p) {
  return fits_int({p.qkv_stride[1], p.grad_out_stride[1], 3 * p.heads * p.head_dim}, p.tokens);
}

// Queue::run<T, head_dim, longer than, up to>(problem, scale_log2, stream, error) for a problem of 16 bits and head_dim
// 32 or 64 whose rows are aligned; it says whether it has queued.
template <class Queue, class Compiled, class Problem>
bool queue_sizes(const Problem& p, void* stream, const char*& error) {
  const float scale_log2 = static_cast<float>(p.scale * kLog2E);
  if (scale_log2 == 0 || !fits_vectors(2, p) || p.batch * p.heads > kMaxBlocks || !fits_int(p)) return false;
  const auto with = [&](auto element) {
    using T = decltype(element);
    if (p.head_dim == 64) return queue_smallest<Queue, T, 64, 0>(Compiled{}, p, scale_log2, stream, error);
    if (p.head_dim == 32) return queue_smallest<Queue, T, 32, 0>(Compiled{}, p, scale_log2, stream, error);
    return false;
  };
  if (p.dtype == DType::bfloat16) return with(bfloat16{});
  if (p.dtype == DType::float16) return with(float16{});
  return false;
}

}  // namespace vitkd::cuda
