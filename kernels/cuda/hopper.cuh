// What the forward and the backward of whole heads on Hopper share: products of 64 rows by four warps.
#pragma once

#include "warpgroup.cuh"

namespace vitkd::cuda {

constexpr int kBlockRows = 64;  // of a product

template <int kCount, class Accumulator>
__device__ __forceinline__ float (&flat(Accumulator& accumulator))[kCount] {
  static_assert(sizeof(Accumulator) == kCount * sizeof(float));
  return reinterpret_cast<float(&)[kCount]>(accumulator);
}

template <int D, class T>
__device__ __forceinline__ Name<D> name_of(const T* matrix) {
  return Name<D>::of(shared_address(matrix));
}

// c = the sum of the products that `issue(k)` starts for each k below kCount, once it is waited for and pinned.
template <int kCount, int kRegisters, class Issue>
__device__ __forceinline__ void start_products(float (&c)[kRegisters], Issue issue) {
  pin(c);
  warpgroup_begin();
#pragma unroll
  for (int k = 0; k < kCount; ++k) issue(k);
  warpgroup_commit();
}
template <int kCount, int kRegisters, class Issue>
__device__ __forceinline__ void sum_products(float (&c)[kRegisters], Issue issue) {
  start_products<kCount>(c, issue);
  warpgroup_wait<0>();
  pin(c);
}

// product (64 x 16*kTiles) = left right^T, of 64 rows from `left` on.
template <class T, int D, int kTiles>
__device__ __forceinline__ void multiply_by_rows(Scores<kTiles>& product, const T* left, const T* right) {
  auto& c = flat<8 * kTiles>(product);
  const auto a = name_of<D>(left), b = name_of<D>(right);
  sum_products<D / 16>(c, [&](int k) {
    WarpgroupProduct<T, kTiles>::template run<false, false>(c, a.further(k * 16), b.further(k * 16), k > 0);
  });
}

// What this thread has asked to be copied, but for the last kPending groups, and what all have written is there for
// products.
template <int kPending>
__device__ __forceinline__ void await_all_but() {
  copy_async_wait<kPending>();
  publish_to_warpgroups();
  __syncthreads();
}

}  // namespace vitkd::cuda
