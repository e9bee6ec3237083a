#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vitkd::cpu {

namespace {

#if defined(__x86_64__) && !defined(VITKD_EMULATED)
bool has_amx() {
#if defined(VITKD_HAVE_AMX) && defined(__linux__)  // hands out the tiles' state only to a process that asked for it
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

CpuFacts detect_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // every CPU with AVX2 since Haswell has F16C; gcc 12 cannot be asked for it
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(VITKD_EMULATED)  // what lies beyond is the tests' plain C++
  return {avx2, avx2, avx2, avx2};
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(VITKD_HAVE_AVX512_BF16)  // the compiler knows it
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#else
  const bool avx512_bf16 = false;
#endif
  return {avx2, avx512, avx512_bf16, avx512_bf16 && has_amx()};
#endif
#else
  return {};
#endif
}

int amd_family() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx, edx;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
  return static_cast<int>((eax >> 8 & 0xf) + (eax >> 20 & 0xff));
#else
  return 0;
#endif
}

const char* chosen_isa() {
  const CpuFacts cpu = detect_cpu();
  const struct {
    const char* name;
    bool there;
  } sets[] = {{"amx", cpu.amx_bf16},
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
