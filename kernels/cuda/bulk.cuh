// A head's rows to shared memory by the bulk tensor copy engine (sm_90): one thread asks for them all, rows that are
// not there come as zeros, and who needs them waits at a barrier in shared memory. Without nvcc an emulator has the
// same functions (tests/kernels/cuda_host).
#pragma once

#include "warpgroup.cuh"

#ifndef __CUDACC__
#include "emulated_bulk.h"
#else

#include <cuda.h>

namespace vitkd::cuda {

using Barrier = uint64_t;
using RowsMap = CUtensorMap;

// For rows of head_dim elements of 16 bits, `box_rows` of a head at a time, swizzled as swizzled() has them. False
// where the engine cannot go through these strides.
inline bool make_rows_map(RowsMap& map, const Attention& p, int box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (status != cudaSuccess) (void)cudaGetLastError();  // not the next launch's
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
        status == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  if (!encode) return false;
  const auto size = [](int64_t count) { return static_cast<cuuint64_t>(count); };
  const cuuint64_t sizes[5] = {size(p.head_dim), size(p.tokens), size(p.heads), 3, size(p.batch)};
  const int64_t strides_of[4] = {p.qkv_stride[1], p.qkv_stride[3], p.qkv_stride[2], p.qkv_stride[0]};
  cuuint64_t strides[4];
  for (int i = 0; i < 4; ++i) {
    if (strides_of[i] < 0) return false;
    strides[i] = size(2 * (sizes[i + 1] == 1 ? p.head_dim : strides_of[i]));  // of one, a stride says nothing
  }
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(p.head_dim), static_cast<cuuint32_t>(box_rows), 1, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto type = p.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle = p.head_dim == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode(&map, type, 5, const_cast<void*>(p.qkv), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Before anything else is done with it; other threads and the engine see it after publish_barriers and a __syncthreads.
__device__ __forceinline__ void make_barrier([[maybe_unused]] Barrier* barrier) {
  VITKD_WARPGROUP("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void publish_barriers() {
  VITKD_WARPGROUP("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The barrier's next phase ends when so many bytes have been brought for it.
__device__ __forceinline__ void expect_bytes([[maybe_unused]] Barrier* barrier, [[maybe_unused]] int bytes) {
  VITKD_WARPGROUP("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                  : "memory");
}

__device__ __forceinline__ void bring_rows([[maybe_unused]] void* shared, [[maybe_unused]] const RowsMap& map,
                                           [[maybe_unused]] Barrier* barrier, [[maybe_unused]] int row,
                                           [[maybe_unused]] Part part, [[maybe_unused]] const Owner& owner) {
  VITKD_WARPGROUP(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::
          "r"(shared_address(shared)), "l"(&map), "r"(0), "r"(row), "r"(owner.head), "r"(static_cast<int>(part)),
      "r"(owner.batch), "r"(shared_address(barrier))
      : "memory");
}

// Waits for the end of a phase, even and odd ones taking turns.
__device__ __forceinline__ void await_phase([[maybe_unused]] Barrier* barrier, [[maybe_unused]] uint32_t parity) {
  uint32_t over = 1;
  do {
    VITKD_WARPGROUP(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!over);
}

// Counts its callers; whether this one is the last of `count`, who sees what the others did before. The next begins
// anew.
__device__ __forceinline__ bool comes_last([[maybe_unused]] uint32_t* counter, [[maybe_unused]] uint32_t count) {
  uint32_t before = 0;
  VITKD_WARPGROUP("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;"
                  : "=r"(before)
                  : "r"(shared_address(counter)), "r"(count - 1)
                  : "memory");
  return before == count - 1;
}

}  // namespace vitkd::cuda

#endif
