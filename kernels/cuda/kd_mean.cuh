// The mean of the rows' losses by the launch that computes them: its blocks count themselves, the last one sums.
#pragma once

#include "kd_team.cuh"
#include "slots.cuh"

namespace vitkd::cuda {

// At the top of a kernel. Whoever comes next may have what room is left, since it waits for the end of all blocks.
__device__ inline void begin() {
  wait_for_earlier();
  let_later_start();
}

// Blocks that have their losses stored, of each launch that may run now.
static __device__ unsigned counters[kSlots];

// Once a block's losses are stored, by thread 0 if they are of one row; what comes back is thread 0's to hand to
// finish_mean. Gradients are stored between the two: the count does not wait for them, nor they for its answer.
template <int kTeams>
__device__ unsigned count_block(const Arguments& p) {
  unsigned before = 0xffffffff;
  if (p.mean) {
    if (kTeams > 1) __syncthreads();
    if (threadIdx.x == 0) before = count_call(&counters[p.slot], gridDim.x);
  }
  return before;
}

// A thread's share of the losses' sum: kCount of them, all on their way at once.
template <int kThreads, int kCount>
__device__ float sum_of_losses(const float* loss, int begin, int rows) {
  float losses[kCount] = {}, parts[4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (begin + i * kThreads < rows) losses[i] = load_of_blocks(loss + begin + i * kThreads);
#pragma unroll
  for (int i = 0; i < kCount; ++i) parts[i % 4] += losses[i];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// The mean of the losses by one block, whichever it is in the same order. The loads' latency is what takes time, so
// that there are 2048 at a time or more, whatever the number of threads.
template <int kThreads>
__device__ void store_mean(const float* loss, int rows, float* mean) {
  constexpr int kFew = 8, kMany = kThreads * kFew < 2048 ? 2048 / kThreads : kFew;
  Values<1> total;
  if (rows <= kThreads * kFew) {
    total.of[0] = sum_of_losses<kThreads, kFew>(loss, threadIdx.x, rows);
  } else {
    double sum = 0;
    for (int begin = threadIdx.x; begin < rows; begin += kThreads * kMany)
      sum += sum_of_losses<kThreads, kMany>(loss, begin, rows);
    total.of[0] = static_cast<float>(sum);
  }
  reduce<kThreads, kMeans>(total, Sum{});
  if (threadIdx.x == 0) *mean = total.of[0] / static_cast<float>(rows);
}

// The last block's work, after all else.
template <int kThreads>
__device__ void finish_mean(const Arguments& p, unsigned before) {
  if (p.mean && any_of_block(before == gridDim.x - 1)) store_mean<kThreads>(p.loss, static_cast<int>(p.rows), p.mean);
}

// The mean where the blocks of the launch before cannot count themselves, or one of them would take long.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) kd_mean_kernel(const T* loss, int rows, T* mean) {
  wait_for_earlier();
  store_mean<kThreads>(loss, rows, mean);
}

}  // namespace vitkd::cuda
