// The functions of kernels/cuda/bulk.cuh on the CPU, from the PTX ISA's sections on mbarrier and cp.async.bulk.tensor.
// A copy lands at once or, by the schedule, not before somebody waits for it.
#pragma once

#include <map>

#include "simt.h"

namespace vitkd::cuda {

using Barrier = uint64_t;

struct RowsMap {
  const unsigned char* data;
  int64_t sizes[5], strides[5];  // in elements of 16 bits: within a row, rows, heads, parts, batch entries
  int box_rows;
};

inline bool make_rows_map(RowsMap& map, const Attention& p, int box_rows) {
  for (int64_t stride : p.qkv_stride)
    if (stride < 0) return false;
  map = {static_cast<const unsigned char*>(p.qkv),
         {p.head_dim, p.tokens, p.heads, 3, p.batch},
         {1, p.qkv_stride[1], p.qkv_stride[3], p.qkv_stride[2], p.qkv_stride[0]},
         box_rows};
  if (box_rows > 256) simt::fail("a box of more than 256 rows");
  return true;
}

// What the hardware keeps in the barrier's 8 bytes.
struct BarrierState {
  int phase = 0;          // how many are over
  bool arrived = false;   // the one thread that arrives
  int64_t missing = 0;    // bytes
  std::vector<std::function<int()>> copies;  // that have not landed; each says how many bytes it brings
  std::vector<int> waiting;                  // threads
};
inline std::map<const Barrier*, BarrierState> barriers;

inline BarrierState& state_of(const Barrier* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) simt::fail("a barrier that nobody made");
  return found->second;
}
inline void make_barrier(Barrier* barrier) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) simt::fail("a barrier off its alignment");
  if (!in_shared(barrier, sizeof *barrier)) simt::fail("a barrier outside shared memory");
  barriers[barrier] = {};
}
inline void publish_barriers() {}

inline void end_phase_if_done(BarrierState& state) {
  if (!state.arrived || state.missing) return;
  ++state.phase;
  state.arrived = false;
  for (int thread : state.waiting) simt::block.ready[thread / kWarp] |= 1u << thread % kWarp;
  state.waiting.clear();
}
inline void land_copies(BarrierState& state) {
  for (const auto& copy : state.copies) state.missing -= copy();
  state.copies.clear();
  end_phase_if_done(state);
}

inline void expect_bytes(Barrier* barrier, int bytes) {
  auto& state = state_of(barrier);
  if (state.arrived) simt::fail("a phase for which one thread arrives twice");
  state.arrived = true;
  state.missing += bytes;
}

inline void bring_rows(void* shared, const RowsMap& map, Barrier* barrier, int row, Part part, const Owner& owner) {
  const uint32_t row_bytes = static_cast<uint32_t>(map.sizes[0]) * 2;
  const int bytes = map.box_rows * static_cast<int>(row_bytes);
  if (shared_address(shared) % (8 * row_bytes)) simt::fail("a box off the alignment of its swizzle");
  if (!in_shared(shared, bytes)) simt::fail("a box outside shared memory");
  const auto copy = [=] {
    const int64_t at[5] = {0, row, owner.head, part, owner.batch};
    for (int i = 0; i < map.box_rows; ++i)
      for (uint32_t unit = 0; unit < row_bytes / 16; ++unit) {
        const uint32_t plain = shared_address(shared) + i * row_bytes + unit * 16;
        const uint32_t address = plain ^ ((plain >> 7 & (row_bytes / 16 - 1)) << 4);
        unsigned char* const to = simt::block.shared + address - 1024;
        int64_t element = unit * 8;
        bool inside = row + i < map.sizes[1];
        for (int axis = 1; axis < 5; ++axis) {
          const int64_t index = at[axis] + (axis == 1 ? i : 0);
          element += index * map.strides[axis];
          if (axis > 1 && index >= map.sizes[axis]) inside = false;
        }
        if (inside) std::memcpy(to, map.data + element * 2, 16);
        else std::memset(to, 0, 16);
      }
    return bytes;
  };
  auto& state = state_of(barrier);
  const bool late = simt::schedule == simt::Schedule::ascending ||
                    (simt::schedule == simt::Schedule::random && simt::random_bits() % 2);
  state.copies.push_back(copy);
  if (!late || !state.waiting.empty()) land_copies(state);
}

inline void await_phase(Barrier* barrier, uint32_t parity) {
  auto& state = state_of(barrier);
  land_copies(state);
  while (state.phase % 2 == static_cast<int>(parity)) {  // the phase of this parity is not over
    state.waiting.push_back(simt::block.current);
    simt::wait();
  }
}

inline bool comes_last(uint32_t* counter, uint32_t count) {
  if (!in_shared(counter, sizeof *counter)) simt::fail("a counter outside shared memory");
  const bool last = ++*counter == count;
  if (last) *counter = 0;
  return last;
}

}  // namespace vitkd::cuda
