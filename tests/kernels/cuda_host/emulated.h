// The functions of kernels/cuda/device.cuh on the CPU. The fragment layouts are written down here a second time, from
// the PTX ISA (sections on mma.m16n8k16 and ldmatrix), element by element and not from the kernels' formulas.
#pragma once

#include <set>

#include "simt.h"

namespace vitkd::cuda {

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(simt::block.shared);
}

inline bool in_shared(const void* pointer, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  return p >= simt::block.shared && p + bytes <= simt::block.shared + simt::block.shared_bytes;
}
inline void check_shared(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16) simt::fail("a 16-byte shared access off its alignment");
  if (!in_shared(pointer, 16)) simt::fail("a 16-byte access outside shared memory");
}

struct Shuffle {
  float value, result;
  int lane;
};
inline float shuffle(float value, int lane) {
  static const char operation = 0;
  Shuffle mine{value, 0, lane};
  simt::warp_collective(&operation, mine, [](Shuffle** all) {
    for (int i = 0; i < kWarp; ++i) all[i]->result = all[all[i]->lane % kWarp]->value;
  });
  return mine.result;
}
inline float shuffle_xor(float value, int mask) { return shuffle(value, threadIdx.x % kWarp ^ mask); }
inline uint32_t shuffle_xor(uint32_t value, int mask) {
  float bits;
  std::memcpy(&bits, &value, 4);
  bits = shuffle_xor(bits, mask);
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int warp_index() { return threadIdx.x / kWarp; }

// ex2.approx.ftz: exact for whole numbers, else 2 ulp off, here always and up or down by a bit of x; no denormals.
inline float fast_exp2(float x) {
  float y = std::exp2(x);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != std::rint(x)) y *= bits & 2 ? 1 + 0x1p-22f : 1 - 0x1p-22f;
  return y < std::numeric_limits<float>::min() ? 0 : y;
}

inline float reciprocal(float x) { return 1 / x; }

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(float16 value) {
  _Float16 half;
  std::memcpy(&half, &value.bits, 2);
  return half;
}

inline void from_float(float& to, float value) { to = value; }
inline void from_float(bfloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  to.bits = value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // nearest even
}
inline void from_float(float16& to, float value) {
  const _Float16 half = static_cast<_Float16>(value);
  std::memcpy(&to.bits, &half, 2);
}

template <class T>
uint32_t pack(float low, float high) {
  T a, b;
  from_float(a, low);
  from_float(b, high);
  return a.bits | uint32_t{b.bits} << 16;
}

inline int recomputed(int value) { return value; }

inline void store_vector(void* global, const Vector<uint32_t>& vector) {
  if (reinterpret_cast<uintptr_t>(global) % 16) simt::fail("a 16-byte store off its alignment");
  std::memcpy(global, &vector, 16);
}

inline void wait_for_earlier() {}
inline void let_later_start() {}

// Blocks run one after another, and each launch is the only one: no atomics are needed.
inline std::set<const unsigned*> counters_used;
inline unsigned count_call(unsigned* counter, unsigned calls) {
  counters_used.insert(counter);
  const unsigned before = *counter;
  *counter = before == calls - 1 ? 0 : before + 1;
  return before;
}
inline float load_of_blocks(const float* global) { return *global; }
inline bool any_of_block(bool value) {
  static bool any;
  any = false;
  __syncthreads();
  any |= value;
  __syncthreads();
  const bool result = any;
  __syncthreads();
  return result;
}

// Where a launch counts its blocks: one launch runs at a time, or the test says that no counter is left.
inline int slot_for(void*) { return simt::slots ? 7 : -1; }

inline void copy_async(void* shared, const void* global, bool inside) {
  check_shared(shared);
  if (inside && reinterpret_cast<uintptr_t>(global) % 16) simt::fail("an asynchronous copy off its alignment");
  const simt::Copy copy{shared, inside ? global : nullptr};
  const bool late = simt::schedule == simt::Schedule::ascending ||
                    (simt::schedule == simt::Schedule::random && simt::random_bits() % 2);
  if (late)
    simt::block.threads[simt::block.current].open_group.push_back(copy);
  else
    simt::land(copy);
}
inline void copy_async_commit() {
  auto& thread = simt::block.threads[simt::block.current];
  thread.groups.push_back(std::move(thread.open_group));
  thread.open_group.clear();
}
template <int kPending>
void copy_async_wait() {
  auto& groups = simt::block.threads[simt::block.current].groups;
  while (groups.size() > kPending) {
    for (const simt::Copy& copy : groups.front()) simt::land(copy);
    groups.erase(groups.begin());
  }
}

struct LoadMatrices {
  const uint16_t* row;
  uint32_t result[4];
};
template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  static const char operation = 0;
  check_shared(row);
  LoadMatrices mine{static_cast<const uint16_t*>(row), {}};
  simt::warp_collective(&operation, mine, [](LoadMatrices** all) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int row = 0; row < 8; ++row)
        for (int column = 0; column < 8; ++column) {
          const uint32_t element = all[8 * matrix + row]->row[column];
          const int major = kTransposed ? column : row, minor = kTransposed ? row : column;
          all[4 * major + minor / 2]->result[matrix] |= element << 16 * (minor % 2);
        }
  });
  std::memcpy(to, mine.result, sizeof mine.result);
}

// Only what has as much shared memory as sm_90 has this instruction.
inline bool stores_matrices() { return simt::max_shared >= 227 * 1024; }
struct StoreMatrices {
  uint16_t* row;
  const uint32_t* registers;
};
inline void store_matrices(void* row, const uint32_t (&from)[4]) {
  static const char operation = 0;
  check_shared(row);
  StoreMatrices mine{static_cast<uint16_t*>(row), from};
  simt::warp_collective(&operation, mine, [](StoreMatrices** all) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int row = 0; row < 8; ++row)
        for (int column = 0; column < 8; ++column) {
          const uint32_t both = all[4 * row + column / 2]->registers[matrix];
          all[8 * matrix + row]->row[column] = static_cast<uint16_t>(both >> 16 * (column % 2));
        }
  });
}

struct Mma {
  uint32_t a[4], b[2];
  float c[4];
};
template <class T>
float half_of(const uint32_t* registers, int i) {
  return to_float(T{static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2))});
}
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static const char operation = 0;
  Mma mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  simt::warp_collective(&operation, mine, [](Mma** all) {
    float a_matrix[16][16], b_matrix[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int group = lane >> 2, in_group = lane & 3;
      for (int i = 0; i < 8; ++i) {
        const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
        const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        a_matrix[row][column] = half_of<T>(all[lane]->a, i);
      }
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        b_matrix[row][group] = half_of<T>(all[lane]->b, i);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int group = lane >> 2, in_group = lane & 3;
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
        for (int k = 0; k < 16; ++k) all[lane]->c[i] += a_matrix[row][k] * b_matrix[k][column];
      }
    }
  });
  std::memcpy(c, mine.c, sizeof mine.c);
}

inline int max_shared_bytes() { return static_cast<int>(simt::max_shared); }
template <class... Parameters>
int64_t resident_blocks(void (*)(Parameters...), int, size_t) {
  return 2;  // so that few heads show what a block does between two of them
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, void*,
                   const Arguments&... arguments) {
  if (grid > kMaxBlocks) return kTooManyBlocks;
  simt::run_grid(grid, block, shared_bytes, [&] { kernel(arguments...); });
  for (const unsigned* counter : counters_used)
    if (*counter != 0) simt::fail("a counter that the next launch would not find at 0");
  return nullptr;
}
template <class... All>
const char* launch_early(All... all) {
  return launch(all...);
}

}  // namespace vitkd::cuda
