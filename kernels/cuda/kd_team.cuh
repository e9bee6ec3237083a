// What the kernels of kd_loss are given, and sums and maxima over the threads that share a row.
#pragma once

#include "../kernels.h"
#include "device.cuh"

namespace vitkd::cuda {

// What the kernels read of KDLoss, with the divisions and the double arithmetic done.
struct Arguments {
  const void *student, *teacher;
  float* loss;
  float* mean;  // or null
  int slot;     // of `counters`, with a mean
  void *student_grad, *teacher_grad;
  int64_t rows, classes, student_stride, teacher_stride;
  float temperature, weight;
  float scale_e, scale_2;  // 1 / temperature, log2(e) / temperature
  bool l1;                 // or mse; for kd_difference_kernel alone
  bool vectors;            // every run of 16 bytes starts on a multiple of 16
};

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <int kCount>
struct alignas(kCount == 1 ? 4 : kCount == 2 ? 8 : 16) Values {
  float of[kCount];

  __device__ void operator+=(const Values& other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) of[i] += other.of[i];
  }
};

// Shared memory of a block: for each warp, what it adds to each of the three reductions that a row can need. They do
// not share a place, so that one barrier per reduction is enough.
enum Place { kLargest = 0, kMeans = 2, kSums = 4, kPlaces = 8 };
constexpr size_t shared_bytes(int threads) { return threads > kWarp ? threads / kWarp * kPlaces * sizeof(float) : 0; }

// The same results in every thread of the team, whatever the order in which they run. Several values at once cost
// little more time than one: the shuffles of one fill the latency of another's.
template <int kTeam, Place kPlace, class Combine, int kCount>
__device__ void reduce(Values<kCount>& values, Combine combine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
#pragma unroll
    for (float& value : values.of) value = combine(value, shuffle_xor(value, mask));
  if constexpr (kTeam > kWarp) {
    float* const shared = shared_memory<float>() + kPlace;
    auto of_warp = [&](int warp) { return reinterpret_cast<Values<kCount>*>(shared + warp * kPlaces); };
    if (threadIdx.x % kWarp == 0) *of_warp(threadIdx.x / kWarp) = values;
    __syncthreads();
    values = *of_warp(0);
#pragma unroll
    for (int warp = 1; warp < kTeam / kWarp; ++warp) {
      const Values<kCount> others = *of_warp(warp);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values.of[i] = combine(values.of[i], others.of[i]);
    }
  }
}

}  // namespace vitkd::cuda
