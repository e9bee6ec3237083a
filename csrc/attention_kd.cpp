#include <tuple>

#include "backend.h"

namespace vitkd {
namespace {

using torch::headeronly::ScalarType;

AttentionSide side(const Tensor& qk, double scale, const Tensor* grad) {
  AttentionSide made{};
  made.dtype = dtype_of(qk, "qk");
  made.heads = qk.size(3);
  made.head_dim = qk.size(4);
  made.scale = scale;
  made.qk = qk.const_data_ptr();
  for (int i = 0; i < 4; ++i) made.stride[i] = qk.stride(i);
  made.grad = grad ? grad->mutable_data_ptr() : nullptr;
  return made;
}

std::tuple<Tensor, Tensor, Tensor> attention_kd(const Tensor& student_any, const Tensor& teacher_any, int64_t kind,
                                                bool average_heads, double student_scale, double teacher_scale,
                                                bool student_grad, bool teacher_grad) {
  const Tensor student = with_contiguous_rows(student_any), teacher = with_contiguous_rows(teacher_any);
  STD_TORCH_CHECK(student.dim() == 5 && teacher.dim() == 5 && student.size(2) >= 2 && teacher.size(2) >= 2 &&
                      student.size(0) == teacher.size(0) && student.size(1) == teacher.size(1),
                  "student and teacher must both be (batch, tokens, 2 or 3, heads, head_dim)");
  STD_TORCH_CHECK(average_heads || student.size(3) == teacher.size(3),
                  "heads can be paired only where both have as many");
  STD_TORCH_CHECK(student.device() == teacher.device(), "student and teacher must have one device");
  const bool wide = student.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide == (teacher.scalar_type() == ScalarType::Double), "float64 goes with float64 alone");
  STD_TORCH_CHECK(0 <= kind && kind <= static_cast<int64_t>(AttentionKDKind::mse), "unknown kind ", kind);

  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t batch = student.size(0), tokens = student.size(1), groups = average_heads ? 1 : student.size(3);
  Tensor loss = new_empty(student, {batch, groups}, type);
  auto gradient = [&](const Tensor& qk, bool wanted) {
    return wanted ? new_empty(qk, {batch, tokens, 2, qk.size(3), qk.size(4)}, type) : new_empty(qk, {0}, type);
  };
  Tensor grad_s = gradient(student, student_grad), grad_t = gradient(teacher, teacher_grad);
  const AttentionKD args{static_cast<AttentionKDKind>(kind),
                         average_heads,
                         batch,
                         tokens,
                         side(student, student_scale, student_grad ? &grad_s : nullptr),
                         side(teacher, teacher_scale, teacher_grad ? &grad_t : nullptr),
                         loss.mutable_data_ptr()};
  if constexpr (kCpu) {
    if (loss.numel() > 0) launch(&cpu::attention_kd, args, student);
  }
  return {loss, grad_s, grad_t};
}

}  // namespace
}  // namespace vitkd

// On a GPU there is the formula, so far.
STABLE_TORCH_LIBRARY_IMPL(vitkd, VITKD_KEY, library) {
  if constexpr (vitkd::kCpu) library.impl("attention_kd", TORCH_BOX(&vitkd::attention_kd));
}
