#include "backend.h"

namespace vitkd {
namespace {

Tensor run(const Tensor& x, const Tensor* grad) {
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  STD_TORCH_CHECK(x.scalar_type() != torch::headeronly::ScalarType::Double, "x must not be float64");
  STD_TORCH_CHECK(grad == nullptr || (grad->is_contiguous() && grad->scalar_type() == x.scalar_type() &&
                                      grad->numel() == x.numel() && grad->device() == x.device()),
                  "grad must be contiguous, with the size, dtype and device of x");
  Gelu args{};
  args.dtype = dtype_of(x, "x");
  args.count = x.numel();
  args.x = x.const_data_ptr();
  args.grad = grad ? grad->const_data_ptr() : nullptr;
  Tensor out = new_empty_strided(x, x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type());
  args.out = out.mutable_data_ptr();
  if constexpr (kCpu) launch(&cpu::gelu, args, x);
  return out;
}

Tensor gelu(const Tensor& x) { return run(x, nullptr); }
Tensor gelu_backward(const Tensor& grad, const Tensor& x) { return run(x, &grad); }

}  // namespace
}  // namespace vitkd

// A GPU has no need of it: torch's own is bound by memory there.
STABLE_TORCH_LIBRARY_IMPL(vitkd, VITKD_KEY, library) {
  if constexpr (vitkd::kCpu) {
    library.impl("gelu", TORCH_BOX(&vitkd::gelu));
    library.impl("gelu_backward", TORCH_BOX(&vitkd::gelu_backward));
  }
}
