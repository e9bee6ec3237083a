#include "backend.h"

namespace vitkd {
namespace {

SimilarityDensity arguments(const Tensor& similarities, int64_t points, double bandwidth) {
  using torch::headeronly::ScalarType;
  const ScalarType type = similarities.scalar_type();
  STD_TORCH_CHECK(similarities.dim() == 2 && similarities.is_contiguous(),
                  "similarities must be (images, M), contiguous");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "similarities must be float32 or float64");
  STD_TORCH_CHECK(points > 0 && bandwidth > 0, "there must be points, and a bandwidth above 0");
  SimilarityDensity args{};
  args.dtype = dtype_of(similarities, "similarities");
  args.images = similarities.size(0);
  args.count = similarities.size(1);
  args.points = points;
  args.bandwidth = bandwidth;
  args.similarities = similarities.const_data_ptr();
  return args;
}

Tensor similarity_density(const Tensor& similarities, int64_t points, double bandwidth) {
  auto args = arguments(similarities, points, bandwidth);
  Tensor density = new_empty(similarities, {args.images, points}, similarities.scalar_type());
  args.density = density.mutable_data_ptr();
  if constexpr (kCpu) {
    if (similarities.numel() > 0) launch(&cpu::similarity_density, args, similarities);
  }
  return density;
}

Tensor similarity_density_backward(const Tensor& grad, const Tensor& similarities, double bandwidth) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.is_contiguous() && grad.scalar_type() == similarities.scalar_type() &&
                      grad.size(0) == similarities.size(0) && grad.device() == similarities.device(),
                  "grad must be (images, points), contiguous, with the dtype and device of similarities");
  auto args = arguments(similarities, grad.size(1), bandwidth);
  Tensor result = new_empty(similarities, {args.images, args.count}, similarities.scalar_type());
  args.grad_density = grad.const_data_ptr();
  args.grad_similarities = result.mutable_data_ptr();
  if constexpr (kCpu) {
    if (similarities.numel() > 0) launch(&cpu::similarity_density, args, similarities);
  }
  return result;
}

}  // namespace
}  // namespace vitkd

// On a GPU there is the formula, so far.
STABLE_TORCH_LIBRARY_IMPL(vitkd, VITKD_KEY, library) {
  if constexpr (vitkd::kCpu) {
    library.impl("similarity_density", TORCH_BOX(&vitkd::similarity_density));
    library.impl("similarity_density_backward", TORCH_BOX(&vitkd::similarity_density_backward));
  }
}
