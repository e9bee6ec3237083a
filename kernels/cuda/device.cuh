// What the kernels ask of the hardware, one thin function per instruction. Without nvcc the same functions come from a
// CPU emulator (tests/kernels/cuda_host), so that the kernels can be proved where there is no GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <map>
#include <type_traits>
#include <utility>

namespace vitkd::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
constexpr int64_t kMaxBlocks = 2147483647;
constexpr const char* kTooManyBlocks = "unsupported size: it needs more than 2147483647 thread blocks";

template <class T>
struct alignas(16) Vector {  // one 16-byte access, the widest there is
  T values[16 / sizeof(T)];
};

constexpr int kWarp = 32;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
template <class T>
constexpr int kVector = 16 / sizeof(T);

constexpr double kLog2E = 1.4426950408889634;  // exp(x) is exp2(kLog2E * x)

// Whether every row starts on 16 bytes and is a whole number of them.
inline bool fits_vectors(size_t element_bytes, std::initializer_list<const void*> pointers,
                         std::initializer_list<int64_t> strides) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  for (int64_t stride : strides)
    if (stride * element_bytes % 16) return false;
  return true;
}

// Where mma.sync puts a 16x8 accumulator: element i of a lane is (row, column).
__host__ __device__ constexpr int accumulator_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
__host__ __device__ constexpr int accumulator_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

}  // namespace vitkd::cuda

#ifndef __CUDACC__
#include "emulated.h"
#else

namespace vitkd::cuda {

template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
template <class Value>
__device__ __forceinline__ Value shuffle_xor(Value value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// This thread's warp, in a form that the compiler knows to be the same for all its lanes.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarp, 0);
}

// The same value; what follows from it is computed where it is needed, and does not wait in registers through a loop.
__device__ __forceinline__ int recomputed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// 2^x to 2 ulp in one instruction; results below 2^-126 become 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp in one instruction, where a division takes a branch.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
__device__ __forceinline__ float to_float(float16 value) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(value.bits));
  return y;
}

__device__ __forceinline__ void from_float(float& to, float value) { to = value; }
__device__ __forceinline__ void from_float(bfloat16& to, float value) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}
__device__ __forceinline__ void from_float(float16& to, float value) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}

// Two values as one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// 16 bytes to global memory; left to itself the compiler tears some of them into four stores.
__device__ __forceinline__ void store_vector(void* global, const Vector<uint32_t>& vector) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(vector.values[0]), "r"(vector.values[1]),
               "r"(vector.values[2]), "r"(vector.values[3])
               : "memory");
}

// For kernels that launch_early starts: all threads call the first before they touch global memory, those that have
// nothing to do with it too. It returns when all that was queued before has ended, and is visible. The second lets the
// next launch, if it is one of these, take the room that this one leaves, once all blocks have called it or ended.
__device__ __forceinline__ void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_later_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// How many of `calls` were before this one; after the last the counter is 0 again. What this thread wrote before, and
// threads of its block that it has met at a barrier since, load_of_blocks finds in the block of the call that is last.
__device__ __forceinline__ unsigned count_call(unsigned* counter, unsigned calls) {
  unsigned before;
  asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(calls - 1)
               : "memory");
  return before;
}

// What another block wrote in this launch: not from this multiprocessor's cache, so that no fence has to clear it.
__device__ __forceinline__ float load_of_blocks(const float* global) {
  float value;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(global) : "memory");
  return value;
}

// A barrier of the block: whether any of its threads brings true.
__device__ __forceinline__ bool any_of_block(bool value) { return __syncthreads_or(value); }

// 16 bytes from global to shared memory in the background, or 16 zero bytes; both addresses 16-byte aligned.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ constexpr bool stores_matrices() { return true; }
// The opposite of load_matrices<false>.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}
#else
__device__ constexpr bool stores_matrices() { return false; }
__device__ __forceinline__ void store_matrices(void*, const uint32_t (&)[4]) {}
#endif

// c (16x8) += a (16x16) b (16x8), products in T, sums in float32.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Most shared memory of a block, in bytes, on the current device.
inline int max_shared_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// How many blocks the current device runs at once; at least 1.
template <class... Parameters>
int64_t resident_blocks(void (*kernel)(Parameters...), int block, size_t shared_bytes) {
  thread_local std::map<std::pair<void (*)(Parameters...), int>, int64_t> known;  // asking takes as long as a launch
  int device = 0, processors = 0, each = 0;
  cudaGetDevice(&device);
  int64_t& blocks = known[{kernel, device}];
  if (blocks) return blocks;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, block, shared_bytes);
  const int64_t found = int64_t{processors} * each;
  if (found > 0) return blocks = found;
  cudaGetLastError();  // the launch will have an error of its own
  return 1;
}

// Queues kernel<<<grid, block>>>; null, or what went wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  if (grid > kMaxBlocks) return kTooManyBlocks;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) {
      cudaGetLastError();  // or the next launch, of another kernel or device, would be told of it
      return cudaGetErrorString(status);
    }
  }
  kernel<<<static_cast<unsigned>(grid), block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Whether the code that the current device runs of this kernel has wait_for_earlier: a GPU that could do it may be
// given what was compiled for an older one. Drivers of before CUDA 12.3 cannot capture such launches into graphs.
template <class... Parameters>
bool waits_for_earlier(void (*kernel)(Parameters...)) {
  static const bool capturable = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
  }();
  thread_local void (*last)(Parameters...) = nullptr;  // of each thread, since a loop asks for few kernels in turn
  thread_local int last_device = -1;
  thread_local bool waits = false;
  int device = -1;
  if (!capturable || cudaGetDevice(&device) != cudaSuccess) return false;
  if (kernel != last || device != last_device) {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
    if (status != cudaSuccess) cudaGetLastError();  // so that the launch does not report it as its own
    waits = status == cudaSuccess && attributes.ptxVersion >= 90;
    last = kernel;
    last_device = device;
  }
  return waits;
}

// The same for a kernel that begins with wait_for_earlier: its blocks come while those of the launch before end, where
// the GPU can do so.
template <class... Parameters, class... Arguments>
const char* launch_early(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, void* stream,
                         const Arguments&... arguments) {
  if (grid > kMaxBlocks || shared_bytes > 48 * 1024 || !waits_for_earlier(kernel))
    return launch(kernel, grid, block, shared_bytes, stream, arguments...);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(status);
}

}  // namespace vitkd::cuda

#endif

namespace vitkd::cuda {

// The halves of what `pack` packed.
template <class T>
__device__ __forceinline__ float low(uint32_t both) {
  return to_float(T{static_cast<uint16_t>(both)});
}
template <class T>
__device__ __forceinline__ float high(uint32_t both) {
  return to_float(T{static_cast<uint16_t>(both >> 16)});
}

// Two 16x8 accumulators side by side lie in the lanes exactly as the 16x16 left operand of mma does.
template <class T>
__device__ __forceinline__ void left_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// Over the four lanes that hold a row of an accumulator.
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}
__device__ __forceinline__ float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

}  // namespace vitkd::cuda
