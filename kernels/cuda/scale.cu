// Both gradients of kd_loss times the gradient that comes from above, which only the device knows. Mostly it is 1, and
// nothing is read or written but that number.
#include "../kernels.h"
#include "device.cuh"

#include <algorithm>

namespace vitkd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 2048;  // at most; each then goes on

template <class T>
__device__ void scale_one(T* data, int64_t count, float factor) {
  const int64_t first = int64_t{blockIdx.x} * kThreads + static_cast<int>(threadIdx.x);
  const int64_t step = int64_t{gridDim.x} * kThreads;
  const int64_t vectors = count / kVector<T>;
  auto* whole = reinterpret_cast<Vector<T>*>(data);
  for (int64_t i = first; i < vectors; i += step) {
    Vector<T> each = whole[i];
#pragma unroll
    for (T& value : each.values) from_float(value, to_float(value) * factor);
    whole[i] = each;
  }
  for (int64_t i = vectors * kVector<T> + first; i < count; i += step) from_float(data[i], to_float(data[i]) * factor);
}

template <class T, int kBlock>
__global__ void __launch_bounds__(kBlock) scale_kernel(const Scale p) {
  wait_for_earlier();
  const float factor = *p.factor * static_cast<float>(p.share);
  if (factor == 1) return;
  scale_one(static_cast<T*>(p.data[0]), p.count[0], factor);
  scale_one(static_cast<T*>(p.data[1]), p.count[1], factor);
}

template <class T>
const char* queue(const Scale& p, void* stream) {
  const int64_t vectors = std::max(p.count[0], p.count[1]) / kVector<T> + 1;
  const int64_t blocks = std::min(kBlocks, (vectors + kThreads - 1) / kThreads);
  return launch_early(scale_kernel<T, kThreads>, blocks, kThreads, 0, stream, p);
}

}  // namespace

const char* scale(const Scale& p, void* stream) {
  if (p.count[0] == 0 && p.count[1] == 0) return nullptr;
  switch (p.dtype) {
    case DType::float32: return queue<float>(p, stream);
    case DType::bfloat16: return queue<bfloat16>(p, stream);
    case DType::float16: return queue<float16>(p, stream);
    default: return "unsupported dtype: the CUDA scale_ takes float32, bfloat16 and float16";
  }
}

}  // namespace vitkd::cuda
