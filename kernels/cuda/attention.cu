#include "attention.cuh"

namespace vitkd::cuda {
namespace {

template <class Problem>
const char* queue(const Problem& p, void* stream) {
  if (p.batch == 0 || p.tokens == 0 || p.heads == 0) return nullptr;
  const char* error = nullptr;
  return queue_hopper(p, stream, error) || queue_head(p, stream, error) ? error : queue_streamed(p, stream);
}

}  // namespace

const char* attention(const Attention& p, void* stream) { return queue(p, stream); }
const char* attention_backward(const AttentionBackward& p, void* stream) { return queue(p, stream); }

}  // namespace vitkd::cuda
