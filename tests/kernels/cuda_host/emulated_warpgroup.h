// The functions of kernels/cuda/warpgroup.cuh on the CPU, from the PTX ISA's sections on wgmma.mma_async: which byte of
// shared memory holds an element follows from the descriptor's own bits, not from the kernels' formulas.
#pragma once

#include "simt.h"

namespace vitkd::cuda {

inline uint32_t shared_address(const void* pointer) {
  // A block's shared memory starts at a multiple of 1024 bytes, as on the device, but not at 0.
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - simt::block.shared) + 1024;
}
inline bool warpgroups() { return true; }
inline bool has_warpgroups() { return simt::warpgroups; }

inline void publish_to_warpgroups() {}

inline void warpgroup_begin() {
  static const char operation = 0;
  int nothing = 0;
  simt::warpgroup_collective(&operation, nothing, [](int**) {});
}
inline void warpgroup_commit() {
  auto& thread = simt::block.threads[simt::block.current];
  thread.committed.push_back(std::move(thread.products));
  thread.products.clear();
}
template <int kPending>
void warpgroup_wait() {
  auto& committed = simt::block.threads[simt::block.current].committed;
  while (committed.size() > kPending) {
    for (const auto& product : committed.front()) product();
    committed.erase(committed.begin());
  }
}
template <int kCount>
void pin(float (&)[kCount]) {}

// One operand: the matrix a descriptor names.
struct Named {
  uint32_t start, group_bytes;
  int swizzled_units;  // of 16 bytes: 8 or 4 in a row

  explicit Named(uint64_t descriptor)
      : start((descriptor & 0x3fff) * 16),
        group_bytes((descriptor >> 32 & 0x3fff) * 16),
        swizzled_units(descriptor >> 62 == 1 ? 8 : 4) {
    if (descriptor >> 62 != 1 && descriptor >> 62 != 2) simt::fail("a swizzle that nobody asked for");
    if (descriptor >> 49 & 7) simt::fail("a base offset");
  }

  // Element `along` of row `row`, a row having all bytes that are swizzled.
  template <class T>
  float at(int row, int along) const {
    const uint32_t row_bytes = swizzled_units * 16;
    if (along * 2u >= row_bytes) simt::fail("wgmma beyond a row");
    const uint32_t plain = start + row / 8 * group_bytes + row % 8 * row_bytes + along * 2;
    const uint32_t address = plain ^ ((plain >> 7 & (swizzled_units - 1)) << 4);
    const unsigned char* pointer = simt::block.shared + address - 1024;
    if (address < 1024 || address + 2 > 1024 + simt::block.shared_bytes) simt::fail("wgmma outside shared memory");
    uint16_t bits;
    std::memcpy(&bits, pointer, 2);
    return to_float(T{bits});
  }
};

// Row k of the operand is what is summed over, or column k is.
template <class T>
float element(uint64_t descriptor, bool transposed, int major, int k) {
  const Named matrix(descriptor);
  return transposed ? matrix.at<T>(k, major) : matrix.at<T>(major, k);
}

template <class T, int kTiles>
struct WarpgroupProduct {
  struct Operation {
    float* c;
    const uint32_t* a_registers;
    uint64_t a, b;
    bool transposed_a, transposed_b, accumulates;
  };

  template <bool kTransposedA, bool kTransposedB>
  static void run(float (&c)[8 * kTiles], uint64_t a, uint64_t b, bool accumulates) {
    queue({c, nullptr, a, b, kTransposedA, kTransposedB, accumulates});
  }
  template <bool kTransposedB>
  static void run(float (&c)[8 * kTiles], const uint32_t (&a)[4], uint64_t b, bool accumulates) {
    queue({c, a, 0, b, false, kTransposedB, accumulates});
  }

  // Now, or when it is waited for: whichever is worse is up to the schedule.
  static void queue(Operation operation) {
    const bool late = simt::schedule == simt::Schedule::descending;
    simt::block.threads[simt::block.current].products.push_back([=] {
      if (late) multiply(operation);
    });
    if (!late) multiply(operation);
  }

  static void multiply(Operation mine) {
    static const char operation = 0;
    simt::warpgroup_collective(&operation, mine, [](Operation** all) {
      const Operation& first = *all[0];
      static float a[64][16], b[16][16 * kTiles];
      for (int lane = 0; lane < kWarpgroup; ++lane) {
        const Operation& its = *all[lane];
        if (its.a != first.a || its.b != first.b || !its.a_registers != !first.a_registers)
          simt::fail("the threads of a warpgroup name different operands");
        if (!its.a_registers) continue;
        for (int i = 0; i < 8; ++i) {
          const int row = lane / 32 * 16 + lane % 32 / 4 + (i / 2 % 2) * 8, column = lane % 4 * 2 + i % 2 + i / 4 * 8;
          a[row][column] = half_of<T>(its.a_registers, i);
        }
      }
      if (!first.a_registers)
        for (int row = 0; row < 64; ++row)
          for (int k = 0; k < 16; ++k) a[row][k] = element<T>(first.a, first.transposed_a, row, k);
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 16 * kTiles; ++column)
          b[k][column] = element<T>(first.b, first.transposed_b, column, k);
      for (int lane = 0; lane < kWarpgroup; ++lane)
        for (int i = 0; i < 8 * kTiles; ++i) {
          const int row = lane / 32 * 16 + lane % 32 / 4 + (i / 2 % 2) * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
          float sum = all[lane]->accumulates ? all[lane]->c[i] : 0;
          for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
          all[lane]->c[i] = sum;
        }
    });
  }
};

}  // namespace vitkd::cuda
