#include "backend.h"

namespace vitkd {
namespace {

template <class Args>
Args arguments(const Tensor& qkv, double scale) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "qkv must be (batch, tokens, 3, heads, head_dim)");
  Args args{};
  args.dtype = args.out_dtype = dtype_of(qkv, "qkv");
  args.batch = qkv.size(0);
  args.tokens = qkv.size(1);
  args.heads = qkv.size(3);
  args.head_dim = qkv.size(4);
  args.scale = scale;
  args.qkv = qkv.const_data_ptr();
  for (int i = 0; i < 4; ++i) args.qkv_stride[i] = qkv.stride(i);
  return args;
}

// Whether a float32 qkv may go with a bfloat16 output: the CPU's kernels round it where they read it.
bool mixes(const Tensor& qkv) {
  return kCpu && qkv.scalar_type() == torch::headeronly::ScalarType::Float;
}

Tensor attention(const Tensor& qkv_any, double scale, bool bfloat16) {
  const Tensor qkv = with_contiguous_rows(qkv_any);
  auto args = arguments<Attention>(qkv, scale);
  STD_TORCH_CHECK(!bfloat16 || mixes(qkv), "bfloat16 is for a float32 qkv on the CPU");
  if (bfloat16) args.out_dtype = DType::bfloat16;
  const auto type = bfloat16 ? torch::headeronly::ScalarType::BFloat16 : qkv.scalar_type();
  Tensor out = new_empty(qkv, {args.batch, args.tokens, args.heads * args.head_dim}, type);
  args.out = out.mutable_data_ptr();
  if (out.numel() > 0) launch(&backend::attention, args, qkv);
  return out;
}

Tensor attention_backward(const Tensor& grad_any, const Tensor& qkv_any, double scale) {
  const Tensor qkv = with_contiguous_rows(qkv_any), grad = with_contiguous_rows(grad_any);
  auto args = arguments<AttentionBackward>(qkv, scale);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == args.batch && grad.size(1) == args.tokens &&
                      grad.size(2) == args.heads * args.head_dim && grad.device() == qkv.device() &&
                      (grad.scalar_type() == qkv.scalar_type() ||
                       (mixes(qkv) && grad.scalar_type() == torch::headeronly::ScalarType::BFloat16)),
                  "grad_out must be (batch, tokens, heads * head_dim) with the dtype and device of qkv");
  args.out_dtype = dtype_of(grad, "grad_out");
  args.grad_out = grad.const_data_ptr();
  args.grad_out_stride[0] = grad.stride(0);
  args.grad_out_stride[1] = grad.stride(1);
  args.grad_out_stride[2] = args.head_dim;
  Tensor grad_qkv =
      new_empty(qkv, {args.batch, args.tokens, 3, args.heads, args.head_dim}, qkv.scalar_type());
  args.grad_qkv = grad_qkv.mutable_data_ptr();
  if (grad_qkv.numel() > 0) launch(&backend::attention_backward, args, qkv);
  return grad_qkv;
}

}  // namespace
}  // namespace vitkd

STABLE_TORCH_LIBRARY_IMPL(vitkd, VITKD_KEY, library) {
  library.impl("attention", TORCH_BOX(&vitkd::attention));
  library.impl("attention_backward", TORCH_BOX(&vitkd::attention_backward));
}
