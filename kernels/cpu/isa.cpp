#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace vitkd::cpu {

CpuFacts detect_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // every CPU with AVX2 since Haswell has F16C; gcc 12 cannot be asked for it
  return {avx2, avx512, avx512 && __builtin_cpu_supports("avx512bf16"), avx512 && __builtin_cpu_supports("amx-bf16")};
#else
  return {};
#endif
}

const char* chosen_isa() {
  const CpuFacts cpu = detect_cpu();
  const struct {
    const char* name;
    bool there;
  } sets[] = {{"amx", false},
              {"avx512_bf16", cpu.avx512_bf16},
              {"avx512", cpu.avx512},
              {"avx2", cpu.avx2},
              {"portable", true}};
  const char* wish = std::getenv("VITKD_CPU_ISA");
  bool reached = true;  // an unknown wish is none
  for (const auto& set : sets) reached = reached && (wish == nullptr || std::strcmp(wish, set.name) != 0);
  for (const auto& set : sets) {
    reached = reached || std::strcmp(wish, set.name) == 0;
    if (reached && set.there) return set.name;
  }
  return "portable";
}

}  // namespace vitkd::cpu
