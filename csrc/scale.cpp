#include "backend.h"

namespace vitkd {
namespace {

void scale(const Tensor& first, const Tensor& second, const Tensor& factor, double share) {
  STD_TORCH_CHECK(first.scalar_type() == second.scalar_type() && first.device() == second.device() &&
                      first.device() == factor.device(),
                  "both tensors must have one dtype, and all three one device");
  STD_TORCH_CHECK(factor.numel() == 1 && factor.scalar_type() == torch::headeronly::ScalarType::Float,
                  "factor must be one float32");
  STD_TORCH_CHECK(first.is_contiguous() && second.is_contiguous(), "both tensors must be contiguous");
  Scale args{};
  args.dtype = dtype_of(first, "first");
  args.factor = static_cast<const float*>(factor.const_data_ptr());
  args.share = share;
  args.count[0] = first.numel();
  args.count[1] = second.numel();
  args.data[0] = first.mutable_data_ptr();
  args.data[1] = second.mutable_data_ptr();
  if constexpr (!kCpu) launch(&cuda::scale, args, first);
}

}  // namespace
}  // namespace vitkd

// The CPU has no need of it: what the factor is can be looked at there.
STABLE_TORCH_LIBRARY_IMPL(vitkd, VITKD_KEY, library) {
  if constexpr (!vitkd::kCpu) library.impl("scale_", TORCH_BOX(&vitkd::scale));
}
