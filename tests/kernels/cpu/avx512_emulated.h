// AVX-512's instructions in plain C++, for the avx512 kernels on a machine without: what Intel's manual says they do.
// Included before all else, in code compiled for AVX2 that is to take itself for more.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace avx512_emulated {

template <class Out, class In>
inline Out as(const In& in) {
  static_assert(sizeof(Out) == sizeof(In));
  Out out;
  std::memcpy(&out, &in, sizeof out);
  return out;
}

struct Floats {
  float at[16];
};
struct Ints {
  uint32_t at[16];
};
struct Halves {  // of 256 bits
  uint16_t at[16];
};
struct ManyHalves {
  uint16_t at[32];
};

template <class F>
inline __m512 each(F f) {
  Floats out;
  for (int i = 0; i < 16; ++i) out.at[i] = f(i);
  return as<__m512>(out);
}
template <class F>
inline __m512i each_int(F f) {
  Ints out;
  for (int i = 0; i < 16; ++i) out.at[i] = f(i);
  return as<__m512i>(out);
}
template <class F>
inline __mmask16 each_bit(F f) {
  unsigned bits = 0;
  for (int i = 0; i < 16; ++i) bits |= unsigned{f(i)} << i;
  return static_cast<__mmask16>(bits);
}

inline __m512 set1_ps(float x) { return each([&](int) { return x; }); }
inline __m512i set1_epi32(int x) { return each_int([&](int) { return static_cast<uint32_t>(x); }); }

inline __m512 max_ps(__m512 a, __m512 b) {  // b where one is NaN
  const auto x = as<Floats>(a), y = as<Floats>(b);
  return each([&](int i) { return x.at[i] > y.at[i] ? x.at[i] : y.at[i]; });
}
template <class F>
inline float by_halves(__m512 v, F f) {
  auto x = as<Floats>(v);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.at[i] = f(x.at[i], x.at[i + half]);
  }
  return x.at[0];
}
inline float reduce_add_ps(__m512 v) {
  return by_halves(v, [](float a, float b) { return a + b; });
}
inline float reduce_max_ps(__m512 v) {
  return by_halves(v, [](float a, float b) { return a > b ? a : b; });
}

inline __m512 roundscale_ps(__m512 v, int) {  // to the nearest whole number, the only mode that is asked for
  const auto x = as<Floats>(v);
  return each([&](int i) { return std::nearbyint(x.at[i]); });
}
inline __m512 reduce_ps(__m512 v, int) {  // what is left above the floor, which alone is asked for; 0 of infinities
  const auto x = as<Floats>(v);
  return each([&](int i) { return std::isinf(x.at[i]) ? 0.0f : x.at[i] - std::floor(x.at[i]); });
}
inline __m512 scalef_ps(__m512 v, __m512 power) {
  const auto x = as<Floats>(v), n = as<Floats>(power);
  return each([&](int i) { return x.at[i] * std::exp2(std::floor(n.at[i])); });
}
inline __m512 maskz_scalef_ps(__mmask16 lanes, __m512 v, __m512 power) {
  const auto x = as<Floats>(v), n = as<Floats>(power);
  return each([&](int i) { return lanes >> i & 1 ? x.at[i] * std::exp2(std::floor(n.at[i])) : 0.0f; });
}
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int how) {
  const auto x = as<Floats>(a), y = as<Floats>(b);
  if (how == _CMP_UNORD_Q) return each_bit([&](int i) { return x.at[i] != x.at[i] || y.at[i] != y.at[i]; });
  if (how == _CMP_NLT_UQ) return each_bit([&](int i) { return !(x.at[i] < y.at[i]); });
  __builtin_trap();
}

inline __m512i add_epi32(__m512i a, __m512i b) {
  const auto x = as<Ints>(a), y = as<Ints>(b);
  return each_int([&](int i) { return x.at[i] + y.at[i]; });
}
inline __m512i and_si512(__m512i a, __m512i b) {
  const auto x = as<Ints>(a), y = as<Ints>(b);
  return each_int([&](int i) { return x.at[i] & y.at[i]; });
}
inline __m512i mask_or_epi32(__m512i other, __mmask16 lanes, __m512i a, __m512i b) {
  const auto x = as<Ints>(a), y = as<Ints>(b), z = as<Ints>(other);
  return each_int([&](int i) { return lanes >> i & 1 ? x.at[i] | y.at[i] : z.at[i]; });
}
inline __m512i slli_epi32(__m512i v, unsigned by) {
  const auto x = as<Ints>(v);
  return each_int([&](int i) { return x.at[i] << by; });
}
inline __m512i srli_epi32(__m512i v, unsigned by) {
  const auto x = as<Ints>(v);
  return each_int([&](int i) { return x.at[i] >> by; });
}
inline __m512i cvtepu16_epi32(__m256i v) {
  const auto x = as<Halves>(v);
  return each_int([&](int i) { return uint32_t{x.at[i]}; });
}
inline __m256i cvtepi32_epi16(__m512i v) {
  const auto x = as<Ints>(v);
  Halves out;
  for (int i = 0; i < 16; ++i) out.at[i] = static_cast<uint16_t>(x.at[i]);
  return as<__m256i>(out);
}

inline __m512 cvtph_ps(__m256i v) {
  const auto x = as<Halves>(v);
  return each([&](int i) { return _cvtsh_ss(x.at[i]); });
}
inline __m256i cvtps_ph(__m512 v, int) {  // to the nearest, as is asked for
  const auto x = as<Floats>(v);
  Halves out;
  for (int i = 0; i < 16; ++i) out.at[i] = static_cast<uint16_t>(_cvtss_sh(x.at[i], 0));
  return as<__m256i>(out);
}

// Masked: lanes that are not asked for are not touched.
template <class Out, class T, int kLanes>
inline Out load(uint32_t lanes, const void* p) {
  T out[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    if (lanes >> i & 1) std::memcpy(&out[i], static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
  }
  return as<Out>(out);
}
inline __m512 maskz_loadu_ps(__mmask16 lanes, const void* p) { return load<__m512, float, 16>(lanes, p); }
inline __m512i maskz_loadu_epi16(__mmask32 lanes, const void* p) { return load<__m512i, uint16_t, 32>(lanes, p); }
inline __m256i maskz_loadu_epi16_256(__mmask16 lanes, const void* p) { return load<__m256i, uint16_t, 16>(lanes, p); }
template <class Lanes>
inline void store(void* p, uint32_t lanes, const Lanes& v) {
  constexpr auto size = sizeof v.at[0];
  for (int i = 0; i < 16; ++i) {
    if (lanes >> i & 1) std::memcpy(static_cast<char*>(p) + i * size, &v.at[i], size);
  }
}
inline void mask_storeu_ps(void* p, __mmask16 lanes, __m512 v) { store(p, lanes, as<Floats>(v)); }
inline void mask_storeu_epi16_256(void* p, __mmask16 lanes, __m256i v) { store(p, lanes, as<Halves>(v)); }

template <class... Numbers>
inline __m512i set_epi16(Numbers... from_the_last) {
  const int last_first[] = {from_the_last...};
  ManyHalves out;
  for (int i = 0; i < 32; ++i) out.at[i] = static_cast<uint16_t>(last_first[31 - i]);
  return as<__m512i>(out);
}
inline __m512i permutexvar_epi16(__m512i order, __m512i v) {
  const auto x = as<ManyHalves>(v), from = as<ManyHalves>(order);
  ManyHalves out;
  for (int i = 0; i < 32; ++i) out.at[i] = x.at[from.at[i] & 31];
  return as<__m512i>(out);
}

// From the low or the high half of every 16 bytes, by turns.
template <int kFirst>
inline __m512i unpack_epi16(__m512i a, __m512i b) {
  const auto x = as<ManyHalves>(a), y = as<ManyHalves>(b);
  ManyHalves out;
  for (int i = 0; i < 32; ++i) out.at[i] = (i % 2 ? y : x).at[i / 8 * 8 + i % 8 / 2 + kFirst];
  return as<__m512i>(out);
}

}  // namespace avx512_emulated

#undef _mm512_unpacklo_epi16
#undef _mm512_unpackhi_epi16
#undef _mm512_set1_ps
#undef _mm512_set1_epi32
#undef _mm512_max_ps
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#undef _mm512_roundscale_ps
#undef _mm512_reduce_ps
#undef _mm512_scalef_ps
#undef _mm512_maskz_scalef_ps
#undef _mm512_cmp_ps_mask
#undef _mm512_add_epi32
#undef _mm512_and_si512
#undef _mm512_mask_or_epi32
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_maskz_loadu_ps
#undef _mm512_maskz_loadu_epi16
#undef _mm512_mask_storeu_ps
#undef _mm512_set_epi16
#undef _mm512_permutexvar_epi16
#undef _mm256_maskz_loadu_epi16
#undef _mm256_mask_storeu_epi16
#define _mm512_unpacklo_epi16 avx512_emulated::unpack_epi16<0>
#define _mm512_unpackhi_epi16 avx512_emulated::unpack_epi16<4>
#define _mm512_set1_ps avx512_emulated::set1_ps
#define _mm512_set1_epi32 avx512_emulated::set1_epi32
#define _mm512_max_ps avx512_emulated::max_ps
#define _mm512_reduce_add_ps avx512_emulated::reduce_add_ps
#define _mm512_reduce_max_ps avx512_emulated::reduce_max_ps
#define _mm512_roundscale_ps avx512_emulated::roundscale_ps
#define _mm512_reduce_ps avx512_emulated::reduce_ps
#define _mm512_scalef_ps avx512_emulated::scalef_ps
#define _mm512_maskz_scalef_ps avx512_emulated::maskz_scalef_ps
#define _mm512_cmp_ps_mask avx512_emulated::cmp_ps_mask
#define _mm512_add_epi32 avx512_emulated::add_epi32
#define _mm512_and_si512 avx512_emulated::and_si512
#define _mm512_mask_or_epi32 avx512_emulated::mask_or_epi32
#define _mm512_slli_epi32 avx512_emulated::slli_epi32
#define _mm512_srli_epi32 avx512_emulated::srli_epi32
#define _mm512_cvtepu16_epi32 avx512_emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 avx512_emulated::cvtepi32_epi16
#define _mm512_cvtph_ps avx512_emulated::cvtph_ps
#define _mm512_cvtps_ph avx512_emulated::cvtps_ph
#define _mm512_maskz_loadu_ps avx512_emulated::maskz_loadu_ps
#define _mm512_maskz_loadu_epi16 avx512_emulated::maskz_loadu_epi16
#define _mm512_mask_storeu_ps avx512_emulated::mask_storeu_ps
#define _mm512_set_epi16 avx512_emulated::set_epi16
#define _mm512_permutexvar_epi16 avx512_emulated::permutexvar_epi16
#define _mm256_maskz_loadu_epi16 avx512_emulated::maskz_loadu_epi16_256
#define _mm256_mask_storeu_epi16 avx512_emulated::mask_storeu_epi16_256
#define __AVX512F__ 1
