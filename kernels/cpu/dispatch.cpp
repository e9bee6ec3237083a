// The one choice of instruction set: made at the first call, the same for every kernel.
#include <cstring>

#include "../kernels.h"
#include "isa.h"

namespace vitkd::cpu {

#define VITKD_DECLARE(isa)                                        \
  namespace isa {                                                 \
  void attention(const Attention&, ParallelFor);                  \
  void attention_backward(const AttentionBackward&, ParallelFor); \
  void kd_loss(const KDLoss&, ParallelFor);                       \
  void gelu(const Gelu&, ParallelFor);                            \
  void attention_kd(const AttentionKD&, ParallelFor);             \
  void attention_shares(const AttentionShares&, ParallelFor);     \
  void similarity_density(const SimilarityDensity&, ParallelFor); \
  }

VITKD_DECLARE(portable)
#if defined(__x86_64__)
VITKD_DECLARE(avx2)
VITKD_DECLARE(avx512)
VITKD_DECLARE(avx512_bf16)  // these two: attention and GELU in bfloat16 alone
VITKD_DECLARE(amx)
#endif

namespace {

struct Kernels {
  decltype(&portable::attention) attention, attention_bf16;
  decltype(&portable::attention_backward) attention_backward, attention_backward_bf16;
  decltype(&portable::kd_loss) kd_loss;
  decltype(&portable::gelu) gelu, gelu_bf16;
  decltype(&portable::attention_kd) attention_kd;
  decltype(&portable::attention_shares) attention_shares;
  decltype(&portable::similarity_density) similarity_density;
};

#define VITKD_KERNELS(isa, bf16)                                                                            \
  Kernels {                                                                                                 \
    isa::attention, bf16::attention, isa::attention_backward, bf16::attention_backward, isa::kd_loss, isa::gelu, \
        bf16::gelu, isa::attention_kd, isa::attention_shares, isa::similarity_density                       \
  }

Kernels choose() {
#if defined(__x86_64__)
  const char* isa = chosen_isa();
#if defined(VITKD_HAVE_AMX)
  if (std::strcmp(isa, "amx") == 0) return VITKD_KERNELS(avx512, amx);
#endif
#if defined(VITKD_HAVE_AVX512_BF16)
  if (std::strcmp(isa, "avx512_bf16") == 0) return VITKD_KERNELS(avx512, avx512_bf16);
#endif
  if (std::strcmp(isa, "avx512") == 0) return VITKD_KERNELS(avx512, avx512);
  if (std::strcmp(isa, "avx2") == 0) return VITKD_KERNELS(avx2, avx2);
#endif
  return VITKD_KERNELS(portable, portable);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

void attention(const Attention& args, ParallelFor parallel_for) {
  const bool bf16 = args.out_dtype == DType::bfloat16;
  (bf16 ? kernels().attention_bf16 : kernels().attention)(args, parallel_for);
}
void attention_backward(const AttentionBackward& args, ParallelFor parallel_for) {
  const bool bf16 = args.out_dtype == DType::bfloat16;
  (bf16 ? kernels().attention_backward_bf16 : kernels().attention_backward)(args, parallel_for);
}
void kd_loss(const KDLoss& args, ParallelFor parallel_for) { kernels().kd_loss(args, parallel_for); }
void gelu(const Gelu& args, ParallelFor parallel_for) {
  (args.dtype == DType::bfloat16 ? kernels().gelu_bf16 : kernels().gelu)(args, parallel_for);
}
void attention_kd(const AttentionKD& args, ParallelFor parallel_for) { kernels().attention_kd(args, parallel_for); }
void attention_shares(const AttentionShares& args, ParallelFor parallel_for) {
  kernels().attention_shares(args, parallel_for);
}
void similarity_density(const SimilarityDensity& args, ParallelFor parallel_for) {
  kernels().similarity_density(args, parallel_for);
}

}  // namespace vitkd::cpu
