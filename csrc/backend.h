// What the ops share: torch's Stable ABI, and how a kernel of either backend is started.
//
// Each file here is compiled once per library: VITKD_BACKEND is cpu or cuda, the namespace of the kernels; VITKD_KEY is
// the dispatcher's key of the same name.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <type_traits>

#include "../kernels/kernels.h"

// In libtorch_cuda; torch declares it only where CUDA's headers are installed.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace vitkd {

namespace backend = VITKD_BACKEND;
constexpr bool kCpu = std::is_same_v<decltype(&backend::attention), void (*)(const Attention&, cpu::ParallelFor)>;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Double: return DType::float64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

// The kernels take any strides but this one.
inline Tensor with_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) == 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// Without the dispatcher, which torch's new_empty goes through: for small tensors that is half of an op.
inline Tensor new_empty_strided(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides,
                                torch::headeronly::ScalarType type) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                        torch::headeronly::ScalarType type) {
  int64_t strides[8], numel = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = numel;
    numel *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  return new_empty_strided(like, static_cast<int64_t>(sizes.size()), sizes.begin(), strides, type);
}

inline void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

template <class Args>
void launch(void (*kernel)(const Args&, cpu::ParallelFor), const Args& args, const Tensor&) {
  kernel(args, parallel_for);
}

template <class Args>
void launch(const char* (*kernel)(const Args&, void*), const Args& args, const Tensor& where) {
  const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &stream));
  const char* error = kernel(args, stream);
  STD_TORCH_CHECK(error == nullptr, "vitkd: ", error);
}

}  // namespace vitkd
