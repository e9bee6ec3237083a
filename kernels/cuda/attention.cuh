// What the two ways to compute an attention share.
#pragma once

#include "../kernels.h"
#include "device.cuh"

namespace vitkd::cuda {

enum Part { kQuery, kKey, kValue };

inline bool fits_vectors(size_t element_bytes, const Attention& p) {
  const auto& s = p.qkv_stride;
  return fits_vectors(element_bytes, {p.qkv, p.out}, {s[0], s[1], s[2], s[3], p.head_dim});
}
inline bool fits_vectors(size_t element_bytes, const AttentionBackward& p) {
  const auto& s = p.qkv_stride;
  const auto& g = p.grad_out_stride;
  return fits_vectors(element_bytes, {p.qkv, p.grad_out, p.grad_qkv},
                      {s[0], s[1], s[2], s[3], g[0], g[1], g[2], p.head_dim});
}

// A kernel whose blocks go through the heads: as many blocks as the GPU runs at once, and no more than heads.
template <class... Parameters, class... Arguments>
const char* launch_at_once(void (*kernel)(Parameters...), int64_t heads, int block, size_t shared_bytes, void* stream,
                           const Arguments&... arguments) {
  const int64_t at_once = resident_blocks(kernel, block, shared_bytes);
  return launch(kernel, heads < at_once ? heads : at_once, block, shared_bytes, stream, arguments...);
}

// Whole heads in shared memory (attention_head.cu): 16-bit elements, head_dim 32 and 64, few tokens, aligned rows.
// False: not for this problem. True: queued, or `error` says what went wrong.
bool queue_head(const Attention&, void* stream, const char*& error);
bool queue_head(const AttentionBackward&, void* stream, const char*& error);

// The same by four warps at a time, where the GPU has instructions for that (attention_hopper.cu).
bool queue_hopper(const Attention&, void* stream, const char*& error);
bool queue_hopper(const AttentionBackward&, void* stream, const char*& error);

// Tiles that pass through shared memory (attention_streamed.cu): everything else. Null, or what went wrong.
const char* queue_streamed(const Attention&, void* stream);
const char* queue_streamed(const AttentionBackward&, void* stream);

}  // namespace vitkd::cuda
