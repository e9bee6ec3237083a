#include <tuple>

#include "backend.h"

namespace vitkd {
namespace {

Tensor mean_of(const Tensor& rows) {
  using torch::headeronly::ScalarType;
  if constexpr (kCpu) {  // small, and torch's own mean would cost more than that
    const int64_t count = rows.size(0);
    const auto type = rows.scalar_type();
    Tensor mean = new_empty(rows, {}, type);
    double sum = 0;
    auto average = [&](const auto* values, auto* out) {
      for (int64_t i = 0; i < count; ++i) sum += values[i];
      *out = sum / count;
    };
    if (type == ScalarType::Double) {
      average(static_cast<const double*>(rows.const_data_ptr()), static_cast<double*>(mean.mutable_data_ptr()));
    } else {
      average(static_cast<const float*>(rows.const_data_ptr()), static_cast<float*>(mean.mutable_data_ptr()));
    }
    return mean;
  } else {
    using torch::stable::detail::from;
    StableIValue stack[] = {from(rows), from(std::optional<ScalarType>())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mean", "", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
}

std::tuple<Tensor, Tensor, Tensor> kd_loss(const Tensor& student_any, const Tensor& teacher_any, int64_t kind,
                                           double temperature, bool student_grad, bool teacher_grad,
                                           double weight, bool mean) {
  using torch::headeronly::ScalarType;
  const Tensor student = with_contiguous_rows(student_any), teacher = with_contiguous_rows(teacher_any);
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0) &&
                      student.size(1) == teacher.size(1) && student.size(1) > 0,
                  "student and teacher must both be (batch, classes)");
  STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type() && student.device() == teacher.device(),
                  "student and teacher must have one dtype and one device");
  STD_TORCH_CHECK(0 <= kind && kind <= static_cast<int64_t>(KDKind::mse), "unknown kind ", kind);

  KDLoss args{};
  args.dtype = dtype_of(student, "student");
  args.kind = static_cast<KDKind>(kind);
  args.rows = student.size(0);
  args.classes = student.size(1);
  args.temperature = temperature;
  args.weight = weight;
  args.student = student.const_data_ptr();
  args.student_stride = student.stride(0);
  args.teacher = teacher.const_data_ptr();
  args.teacher_stride = teacher.stride(0);

  const auto row_type = args.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  Tensor loss = new_empty(student, {args.rows}, row_type);
  auto gradient = [&](bool wanted) {
    const auto type = student.scalar_type();
    return wanted ? new_empty(student, {args.rows, args.classes}, type) : new_empty(student, {0}, type);
  };
  Tensor grad_s = gradient(student_grad), grad_t = gradient(teacher_grad);
  args.loss = loss.mutable_data_ptr();
  const bool by_kernel = !kCpu && mean && 0 < args.rows && args.rows <= kMeanRows;
  Tensor average = by_kernel ? new_empty(student, {}, row_type) : loss;
  args.mean = by_kernel ? average.mutable_data_ptr() : nullptr;
  args.student_grad = student_grad ? grad_s.mutable_data_ptr() : nullptr;
  args.teacher_grad = teacher_grad ? grad_t.mutable_data_ptr() : nullptr;
  if (args.rows > 0) launch(&backend::kd_loss, args, student);
  return {mean && !by_kernel ? mean_of(loss) : average, grad_s, grad_t};
}

}  // namespace
}  // namespace vitkd

STABLE_TORCH_LIBRARY_IMPL(vitkd, VITKD_KEY, library) { library.impl("kd_loss", TORCH_BOX(&vitkd::kd_loss)); }
