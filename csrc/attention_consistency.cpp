#include "backend.h"

namespace vitkd {
namespace {

using torch::headeronly::ScalarType;

const int64_t* places(const Tensor& numbers, int64_t tokens, const char* name) {
  STD_TORCH_CHECK(numbers.dim() == 1 && numbers.is_contiguous() && numbers.scalar_type() == ScalarType::Long &&
                      numbers.numel() > 0,
                  name, " must be one int64 or more, contiguous");
  const auto* first = static_cast<const int64_t*>(numbers.const_data_ptr());
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    STD_TORCH_CHECK(0 <= first[i] && first[i] < tokens, name, " must be numbers of tokens, below ", tokens);
  }
  return first;
}

AttentionShares arguments(const Tensor& qk, const Tensor& queries, const Tensor& keys, double scale) {
  STD_TORCH_CHECK(qk.dim() == 5 && qk.size(2) >= 2, "qk must be (batch, tokens, 2 or 3, heads, head_dim)");
  STD_TORCH_CHECK(qk.device() == queries.device() && qk.device() == keys.device(),
                  "qk, queries and keys must have one device");
  AttentionShares args{};
  args.dtype = dtype_of(qk, "qk");
  args.batch = qk.size(0);
  args.tokens = qk.size(1);
  args.slots = qk.size(2);
  args.heads = qk.size(3);
  args.head_dim = qk.size(4);
  args.scale = scale;
  args.qk = qk.const_data_ptr();
  for (int i = 0; i < 4; ++i) args.stride[i] = qk.stride(i);
  args.query_count = queries.numel();
  args.key_count = keys.numel();
  args.queries = places(queries, args.tokens, "queries");
  args.keys = places(keys, args.tokens, "keys");
  return args;
}

ScalarType type_of(const Tensor& qk) {
  return qk.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor attention_shares(const Tensor& qk_any, const Tensor& queries, const Tensor& keys, double scale) {
  const Tensor qk = with_contiguous_rows(qk_any);
  auto args = arguments(qk, queries, keys, scale);
  Tensor shares = new_empty(qk, {args.batch, args.heads, args.key_count}, type_of(qk));
  args.shares = shares.mutable_data_ptr();
  if constexpr (kCpu) {
    if (shares.numel() > 0) launch(&cpu::attention_shares, args, qk);
  }
  return shares;
}

Tensor attention_shares_backward(const Tensor& grad, const Tensor& qk_any, const Tensor& queries, const Tensor& keys,
                                 double scale) {
  const Tensor qk = with_contiguous_rows(qk_any);
  auto args = arguments(qk, queries, keys, scale);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == args.batch && grad.size(1) == args.heads &&
                      grad.size(2) == args.key_count && grad.is_contiguous() && grad.scalar_type() == type_of(qk) &&
                      grad.device() == qk.device(),
                  "grad must be (batch, heads, keys), contiguous, float64 where qk is and else float32");
  Tensor result = new_empty(qk, {args.batch, args.tokens, args.slots, args.heads, args.head_dim}, qk.scalar_type());
  args.grad_shares = grad.const_data_ptr();
  args.grad_qk = result.mutable_data_ptr();
  if constexpr (kCpu) {
    if (result.numel() > 0) launch(&cpu::attention_shares, args, qk);
  }
  return result;
}

}  // namespace
}  // namespace vitkd

// On a GPU there is the formula, so far.
STABLE_TORCH_LIBRARY_IMPL(vitkd, VITKD_KEY, library) {
  if constexpr (vitkd::kCpu) {
    library.impl("attention_shares", TORCH_BOX(&vitkd::attention_shares));
    library.impl("attention_shares_backward", TORCH_BOX(&vitkd::attention_shares_backward));
  }
}
