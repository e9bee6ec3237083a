// Which counter a launch gets whose blocks count themselves. It is 0 before the launch and after, and two launches that
// may run at once must not share one.
//
// What is in a stream runs one after another, so it has one counter for all its launches; streams' ids, unlike their
// handles, never come back. A captured launch runs whenever its graph does, perhaps on several streams by several
// graphs captured on one; only what was instantiated of one does not overlap with itself, and torch instantiates a graph
// once. So each captured launch keeps a counter for good.
#pragma once

#include "device.cuh"

#ifdef __CUDACC__
#include <map>
#include <mutex>
#include <utility>
#endif

namespace vitkd::cuda {

constexpr int kSlots = 65536;

#ifdef __CUDACC__
// Its number, or -1 when there is none left.
inline int slot_for(void* stream_any) {
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, int> of_streams;
  static int given = 0;
  const auto stream = static_cast<cudaStream_t>(stream_any);
  cudaStreamCaptureStatus capture;
  int device;
  unsigned long long id = 0;
  if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess || cudaGetDevice(&device) != cudaSuccess ||
      (capture == cudaStreamCaptureStatusNone && cudaStreamGetId(stream, &id) != cudaSuccess)) {
    cudaGetLastError();  // so that the launch does not report it as its own
    return -1;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  if (capture != cudaStreamCaptureStatusNone) return given < kSlots ? given++ : -1;
  const auto found = of_streams.find({device, id});
  if (found != of_streams.end()) return found->second;
  if (given == kSlots) return -1;
  of_streams[{device, id}] = given;
  return given++;
}
#endif

}  // namespace vitkd::cuda
