// Which instruction sets this CPU has, and which one the kernels use.
#pragma once

namespace vitkd::cpu {

struct CpuFacts {
  bool avx2, avx512, avx512_bf16, amx_bf16;
};

CpuFacts detect_cpu();

// 25 for Zen 3 and 4, 26 for Zen 5, … as AMD counts; 0 for CPUs of others.
int amd_family();

// "amx", "avx512_bf16", "avx512", "avx2" or "portable": the best that this CPU has, or what VITKD_CPU_ISA asks for.
// A wish that cannot be met (not on this CPU) is answered with the best below it, an unknown one with the best.
const char* chosen_isa();

}  // namespace vitkd::cpu
