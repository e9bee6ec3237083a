#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vitkd::cpu {

namespace {

// Linux hands out the tiles' state only to a process that asked for it.
bool tiles_granted() {
#if defined(VITKD_AMX_EMULATED)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

CpuFacts detect_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // every CPU with AVX2 since Haswell has F16C; gcc 12 cannot be asked for it
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(VITKD_AMX_EMULATED)
  const bool amx = avx512_bf16;
#else
  const bool amx = avx512_bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
#endif
  return {avx2, avx512, avx512_bf16, amx && tiles_granted()};
#else
  return {};
#endif
}

const char* chosen_isa() {
  const CpuFacts cpu = detect_cpu();
  const struct {
    const char* name;
    bool there;
  } sets[] = {
#if defined(VITKD_HAVE_AMX)  // the compiler knew it
              {"amx", cpu.amx_bf16},
#endif
#if defined(VITKD_HAVE_AVX512_BF16)
              {"avx512_bf16", cpu.avx512_bf16},
#endif
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
