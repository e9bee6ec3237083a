// AMX's tile instructions in plain C++, for the amx kernels on a machine without: what Intel's manual says they do.
// Included before all else.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_emulated {

struct Tile {
  int rows = 0, row_bytes = 0;
  alignas(64) unsigned char bytes[16][64];
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline Tile& tile(int number) {
  if (!configured) std::abort();  // #UD
  return tiles[number];
}

inline void loadconfig(const void* config) {
  const auto* bytes = static_cast<const unsigned char*>(config);
  if (bytes[0] != 1) std::abort();
  for (int i = 0; i < 8; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    tiles[i].rows = bytes[48 + i];
    tiles[i].row_bytes = row_bytes;
    std::memset(tiles[i].bytes, 0, sizeof tiles[i].bytes);
  }
  configured = true;
}

inline void release() { configured = false; }

inline void zero(int number) { std::memset(tile(number).bytes, 0, sizeof tile(number).bytes); }

inline void load(int number, const void* base, size_t stride) {
  Tile& t = tile(number);
  for (int i = 0; i < t.rows; ++i) std::memcpy(t.bytes[i], static_cast<const char*>(base) + i * stride, t.row_bytes);
}

inline void store(int number, void* base, size_t stride) {
  const Tile& t = tile(number);
  for (int i = 0; i < t.rows; ++i) std::memcpy(static_cast<char*>(base) + i * stride, t.bytes[i], t.row_bytes);
}

inline float widened(const unsigned char* bf16) {
  uint16_t half;
  std::memcpy(&half, bf16, 2);
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void dpbf16ps(int sums, int rows, int columns) {
  Tile &c = tile(sums), &a = tile(rows), &b = tile(columns);
  if (a.row_bytes / 4 != b.rows || a.rows != c.rows || b.row_bytes != c.row_bytes) std::abort();
  for (int m = 0; m < c.rows; ++m) {
    for (int k = 0; k < b.rows; ++k) {
      for (int n = 0; n < c.row_bytes / 4; ++n) {
        float sum;
        std::memcpy(&sum, c.bytes[m] + 4 * n, 4);
        for (int half = 0; half < 4; half += 2)
          sum += widened(a.bytes[m] + 4 * k + half) * widened(b.bytes[k] + 4 * n + half);
        std::memcpy(c.bytes[m] + 4 * n, &sum, 4);
      }
    }
  }
}

}  // namespace amx_emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulated::loadconfig
#define _tile_release amx_emulated::release
#define _tile_zero amx_emulated::zero
#define _tile_loadd amx_emulated::load
#define _tile_stored amx_emulated::store
#define _tile_dpbf16ps amx_emulated::dpbf16ps
#define __AMX_BF16__ 1
