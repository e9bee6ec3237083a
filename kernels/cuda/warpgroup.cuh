// Products by four warps at once ("wgmma", sm_90a): 64 rows, operands straight from shared memory, done in the
// background. Without nvcc an emulator has the same functions (tests/kernels/cuda_host).
#pragma once

#include "head.cuh"

namespace vitkd::cuda {

constexpr int kWarpgroup = 4 * kWarp;

// A swizzled matrix of rows of D elements in shared memory, as wgmma wants it named (PTX ISA, "Matrix descriptor
// format"): groups of 8 rows follow each other from `address` on, and a row's 128 or 64 bytes are swizzled.
template <int D>
struct Name {
  // What depends on the address: 32-bit sums cost half of 64-bit ones, which instructions and registers add to.
  uint32_t low;

  __host__ __device__ static constexpr Name of(uint32_t address) { return {(address & 0x3ffff) / 16 | 1u << 16}; }
  // What lies `elements` on: 16 columns of the rows, or whole groups of 8 rows.
  __host__ __device__ constexpr Name further(int elements) const {
    return {low + static_cast<uint32_t>(elements * 2 / 16)};
  }
  __host__ __device__ constexpr operator uint64_t() const {
    constexpr uint32_t kSwizzle = D == 64 ? 1 : 2, kGroupBytes = 8 * 2 * D;
    return uint64_t{kGroupBytes / 16 | kSwizzle << 30} << 32 | low;
  }
};

}  // namespace vitkd::cuda

#ifndef __CUDACC__
#include "emulated_warpgroup.h"
#else

namespace vitkd::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ constexpr bool warpgroups() { return true; }
#define VITKD_WARPGROUP(...) asm volatile(__VA_ARGS__)
#else
__device__ constexpr bool warpgroups() { return false; }
#define VITKD_WARPGROUP(...)
#endif

// Whether the current device has them, and this library its code for it.
inline bool has_warpgroups() {
#ifdef VITKD_SM90A
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

// What this thread has written to shared memory, or its copies have, is there for wgmma after the next barrier.
__device__ __forceinline__ void publish_to_warpgroups() {
  VITKD_WARPGROUP("fence.proxy.async.shared::cta;" ::: "memory");
}
// Before the first of some products: registers that they take may have been written.
__device__ __forceinline__ void warpgroup_begin() { VITKD_WARPGROUP("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { VITKD_WARPGROUP("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void warpgroup_wait() {
  VITKD_WARPGROUP("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accumulators about while products are under way.
template <int kCount>
__device__ __forceinline__ void pin(float (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) VITKD_WARPGROUP("" : "+f"(c[i])::"memory");
}

#define VITKD_REGISTERS_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define VITKD_EIGHT(i) \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), \
  "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define VITKD_OUTPUTS_1 VITKD_EIGHT(0)
#define VITKD_REGISTERS_2 VITKD_REGISTERS_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define VITKD_OUTPUTS_2 VITKD_OUTPUTS_1, VITKD_EIGHT(8)
#define VITKD_REGISTERS_3 VITKD_REGISTERS_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define VITKD_OUTPUTS_3 VITKD_OUTPUTS_2, VITKD_EIGHT(16)
#define VITKD_REGISTERS_4 VITKD_REGISTERS_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define VITKD_OUTPUTS_4 VITKD_OUTPUTS_3, VITKD_EIGHT(24)
#define VITKD_REGISTERS_5 VITKD_REGISTERS_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define VITKD_OUTPUTS_5 VITKD_OUTPUTS_4, VITKD_EIGHT(32)
#define VITKD_REGISTERS_6 VITKD_REGISTERS_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VITKD_OUTPUTS_6 VITKD_OUTPUTS_5, VITKD_EIGHT(40)
#define VITKD_REGISTERS_7 VITKD_REGISTERS_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define VITKD_OUTPUTS_7 VITKD_OUTPUTS_6, VITKD_EIGHT(48)
#define VITKD_REGISTERS_8 VITKD_REGISTERS_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define VITKD_OUTPUTS_8 VITKD_OUTPUTS_7, VITKD_EIGHT(56)
#define VITKD_REGISTERS_9 VITKD_REGISTERS_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define VITKD_OUTPUTS_9 VITKD_OUTPUTS_8, VITKD_EIGHT(64)
#define VITKD_REGISTERS_10 VITKD_REGISTERS_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define VITKD_OUTPUTS_10 VITKD_OUTPUTS_9, VITKD_EIGHT(72)
#define VITKD_REGISTERS_11 VITKD_REGISTERS_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define VITKD_OUTPUTS_11 VITKD_OUTPUTS_10, VITKD_EIGHT(80)
#define VITKD_REGISTERS_12 VITKD_REGISTERS_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define VITKD_OUTPUTS_12 VITKD_OUTPUTS_11, VITKD_EIGHT(88)
#define VITKD_REGISTERS_13 VITKD_REGISTERS_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define VITKD_OUTPUTS_13 VITKD_OUTPUTS_12, VITKD_EIGHT(96)

#define VITKD_PRODUCT(type, columns, registers, left, right, accumulates, transposed)                \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " accumulates ", 0;\n"                                            \
  "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" registers "}, " left ", " \
  right ", p, 1, 1, " transposed ";\n}\n"

// c (64 x 16*kTiles) = or += a (64 x 16) b (16 x 16*kTiles). `a` and `b` name matrices whose rows are rows of a and
// columns of b; where transposed, columns of a and rows of b. c is as of mma, each warp having 16 rows.
template <class T, int kTiles>
struct WarpgroupProduct;

#define VITKD_DEFINE_PRODUCT(tiles, columns, registers, outputs, i0, i1, i2, i3, i4, i5, i6)                          \
  template <class T>                                                                                                 \
  struct WarpgroupProduct<T, tiles> {                                                                                \
    template <bool kTransposedA, bool kTransposedB>                                                                  \
    __device__ __forceinline__ static void run([[maybe_unused]] float (&c)[8 * tiles], [[maybe_unused]] uint64_t a,  \
                                               [[maybe_unused]] uint64_t b, [[maybe_unused]] bool accumulates) {     \
      if constexpr (std::is_same_v<T, bfloat16>)                                                                     \
        VITKD_WARPGROUP(VITKD_PRODUCT("bf16", columns, registers, "%" #i0, "%" #i1, "%" #i2, "%" #i3 ", %" #i4)      \
                        : outputs                                                                                    \
                        : "l"(a), "l"(b), "r"(int{accumulates}), "n"(int{kTransposedA}), "n"(int{kTransposedB}));    \
      else                                                                                                           \
        VITKD_WARPGROUP(VITKD_PRODUCT("f16", columns, registers, "%" #i0, "%" #i1, "%" #i2, "%" #i3 ", %" #i4)       \
                        : outputs                                                                                    \
                        : "l"(a), "l"(b), "r"(int{accumulates}), "n"(int{kTransposedA}), "n"(int{kTransposedB}));    \
    }                                                                                                                \
    template <bool kTransposedB>                                                                                     \
    __device__ __forceinline__ static void run([[maybe_unused]] float (&c)[8 * tiles],                               \
                                               [[maybe_unused]] const uint32_t (&a)[4], [[maybe_unused]] uint64_t b, \
                                               [[maybe_unused]] bool accumulates) {                                  \
      if constexpr (std::is_same_v<T, bfloat16>)                                                                     \
        VITKD_WARPGROUP(VITKD_PRODUCT("bf16", columns, registers, "{%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}",        \
                                      "%" #i4, "%" #i5, "%" #i6)                                                     \
                        : outputs                                                                                    \
                        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulates}),                 \
                          "n"(int{kTransposedB}));                                                                   \
      else                                                                                                           \
        VITKD_WARPGROUP(VITKD_PRODUCT("f16", columns, registers, "{%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}",         \
                                      "%" #i4, "%" #i5, "%" #i6)                                                     \
                        : outputs                                                                                    \
                        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulates}),                 \
                          "n"(int{kTransposedB}));                                                                   \
    }                                                                                                                \
  }

VITKD_DEFINE_PRODUCT(2, 32, VITKD_REGISTERS_2, VITKD_OUTPUTS_2, 16, 17, 18, 19, 20, 21, 22);
VITKD_DEFINE_PRODUCT(3, 48, VITKD_REGISTERS_3, VITKD_OUTPUTS_3, 24, 25, 26, 27, 28, 29, 30);
VITKD_DEFINE_PRODUCT(4, 64, VITKD_REGISTERS_4, VITKD_OUTPUTS_4, 32, 33, 34, 35, 36, 37, 38);
VITKD_DEFINE_PRODUCT(5, 80, VITKD_REGISTERS_5, VITKD_OUTPUTS_5, 40, 41, 42, 43, 44, 45, 46);
VITKD_DEFINE_PRODUCT(7, 112, VITKD_REGISTERS_7, VITKD_OUTPUTS_7, 56, 57, 58, 59, 60, 61, 62);
VITKD_DEFINE_PRODUCT(8, 128, VITKD_REGISTERS_8, VITKD_OUTPUTS_8, 64, 65, 66, 67, 68, 69, 70);
VITKD_DEFINE_PRODUCT(9, 144, VITKD_REGISTERS_9, VITKD_OUTPUTS_9, 72, 73, 74, 75, 76, 77, 78);
VITKD_DEFINE_PRODUCT(13, 208, VITKD_REGISTERS_13, VITKD_OUTPUTS_13, 104, 105, 106, 107, 108, 109, 110);

}  // namespace vitkd::cuda

#endif
