// Vectors for the CPU kernels, in GCC's and Clang's vector extension: the same source is compiled once per instruction
// set (VITKD_ISA names the namespace), so a vector is as wide as that set allows. Nothing here may be an inline
// function shared between the sets: the linker would keep one copy, and run AVX-512 code on a CPU without it.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__F16C__) || defined(__AVX512F__)
#if defined(__clang__)
#include <immintrin.h>
#else
#pragma GCC diagnostic push  // gcc 12 finds its own _mm512_undefined uninitialised
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#endif

// Before a loop over a small array of vectors, whose bounds are constants: gcc keeps such an array in registers only if
// the loop is gone before it decides where arrays live. Left to itself it unrolls later, and zeroes, stores and reloads
// the array in memory.
#if defined(__clang__)
#define VITKD_UNROLL _Pragma("unroll")
#else
#define VITKD_UNROLL _Pragma("GCC unroll 16")
#endif

namespace vitkd::cpu::VITKD_ISA {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
constexpr int64_t kLanes = kVectorBytes / int64_t{sizeof(T)};

template <class T>
int64_t pad(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> broadcast(T x) {
  return Vec<T>{} + x;
}

template <class T, int64_t... I>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int64_t, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, typename Lanes<T>::Int{I...});
#endif
}

// One of the two vectors that exchange parts of a and b: for a `width` below 16 bytes, runs of so many lanes from
// the low or high half of each 16 bytes, by turns; else those 16 bytes of a, and then of b, that are even or odd.
template <int64_t width, bool high, class T, int64_t... I>
inline Vec<T> part(Vec<T> a, Vec<T> b, std::integer_sequence<int64_t, I...>) {
  constexpr int64_t lanes = kLanes<T>, block = 16 / int64_t{sizeof(T)}, half = lanes / 2;
  if constexpr (width < block) {
    constexpr int64_t first = high ? block / 2 : 0;
    return shuffle<T>(a, b, std::integer_sequence<int64_t, (I / width % 2 * lanes + I / block * block + first +
                                                            I % block / (2 * width) * width + I % width)...>{});
  } else {
    constexpr int64_t first = high ? block : 0;
    return shuffle<T>(a, b, std::integer_sequence<int64_t, (I / half * lanes + I % half / block * 2 * block + first +
                                                            I % block)...>{});
  }
}

template <int64_t width, bool high, class T>
inline Vec<T> part(Vec<T> a, Vec<T> b) {
  return part<width, high, T>(a, b, std::make_integer_sequence<int64_t, kLanes<T>>{});
}

template <class T, int64_t width>
inline void exchange(Vec<T> (&rows)[kLanes<T>]) {
  VITKD_UNROLL
  for (int64_t i = 0; i < kLanes<T>; ++i) {
    if (i & width) continue;
    const Vec<T> a = rows[i], b = rows[i + width];
    rows[i] = part<width, false, T>(a, b);
    rows[i + width] = part<width, true, T>(a, b);
  }
  if constexpr (2 * width < kLanes<T>) exchange<T, 2 * width>(rows);
}

// A square of lanes in place: first in each 16 bytes of the registers, where shuffles are cheapest.
template <class T>
inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  exchange<T, 1>(rows);
  if constexpr (sizeof(T) == 4) {  // of four rows the second and the third came out the other way round
    VITKD_UNROLL
    for (int64_t i = 1; i < kLanes<T>; i += 4) {
      const Vec<T> second = rows[i + 1];
      rows[i + 1] = rows[i];
      rows[i] = second;
    }
  }
}

// The sum of each row over its lanes, in the lane of the row's number: the rows are overwritten.
template <class T, int64_t width = 1>
inline Vec<T> sums_of(Vec<T> (&rows)[kLanes<T>]) {
  VITKD_UNROLL
  for (int64_t i = 0; i < kLanes<T> / (2 * width); ++i) {
    const Vec<T> a = rows[2 * i], b = rows[2 * i + 1];
    rows[i] = part<width, false, T>(a, b) + part<width, true, T>(a, b);
  }
  if constexpr (2 * width < kLanes<T>) return sums_of<T, 2 * width>(rows);
  return rows[0];
}

// Over the lanes, by halves.
template <class T>
inline T sum(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)  // gcc makes a comparison and a blend of the last line
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

template <class T>
inline T max(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)v);
#endif
  T most = v[0];
  for (int64_t i = 1; i < kLanes<T>; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

constexpr double kLog2E = 1.4426950408889634;

// 2^f for |f| <= 1/2: a minimax polynomial, relative error 2e-9.
inline Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = broadcast(1.53458104e-4f);
  p = p * f + 1.33999312e-3f;
  p = p * f + 9.61848896e-3f;
  p = p * f + 5.55032878e-2f;
  p = p * f + 2.40226469e-1f;
  p = p * f + 6.93147206e-1f;
  return p * f + 1.0f;
}

// 2^x for x <= 0, to the last bit or two. NaN stays NaN, 2^-127 and less is 0.
inline Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<float> p = exp2_fraction(x - (Vec<float>)n);
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(counts, (__m512)p, n);
#else
  using Int = Lanes<float>::Int;
  constexpr float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23: the low bits of a sum with it are the exponent of 2^n
  const Vec<float> y = maximum<float>(broadcast(-127.0f), x), shifted = y + shift;
  return exp2_fraction(y - (shifted - shift)) * (Vec<float>)((Int)shifted << 23);
#endif
}

#if defined(__AVX512F__)
// The same where it is rounded to bfloat16 anyway: relative error 9e-5. What is left of x above its floor is 0 for
// -infinity, too.
inline Vec<float> exp2_coarse(Vec<float> x) {
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec<float> p = broadcast(7.70670475e-2f);
  p = p * f + 2.27644982e-1f;
  p = p * f + 6.95116790e-1f;
  return (Vec<float>)_mm512_scalef_ps((__m512)(p * f + 1.0f), (__m512)x);
}
#else
inline Vec<float> exp2_coarse(Vec<float> x) { return exp2(x); }
#endif

inline Vec<double> exp2(Vec<double> x) {
  using Int = Lanes<double>::Int;
  const Vec<double> shifted = x + 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> y = (x - (shifted - 6755399441055744.0)) * 0.69314718055994530942;
  // e^y by its Taylor series: y^14 / 14! < 2^-58 for |y| <= ln(2) / 2
  Vec<double> p = broadcast(1.0);
  for (int k = 13; k >= 1; --k) p = p * y * (1.0 / k) + 1.0;
  const Int bits = (Int)p + ((Int)shifted << 52);
  Vec<double> result = x < -1022.0 ? Vec<double>{} : (Vec<double>)bits;
  return x != x ? x : result;
}

// e^x - 1 for x <= 0 with a small relative error near 0 too, and none of first order: e^x is a power of two times e^y,
// and e^y - 1 is y times a Taylor series that begins with 1. NaN stays NaN.
inline Vec<float> exp_minus_1(Vec<float> x) {
  using Int = Lanes<float>::Int;
  x = maximum<float>(broadcast(-20.0f), x);  // less than that is -1
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const Vec<float> y = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2), whose first part has few bits
  Vec<float> p = broadcast(1.0f);
  VITKD_UNROLL
  for (int k = 8; k >= 2; --k) p = p * y * (1.0f / k) + 1.0f;
  const Vec<float> power = (Vec<float>)(((Int)shifted << 23) + (127 << 23));
  return p * y * power + (power - 1.0f);
}

inline Vec<double> exp_minus_1(Vec<double> x) {
  using Int = Lanes<double>::Int;
  x = maximum<double>(broadcast(-40.0), x);
  const Vec<double> shifted = x * 1.44269504088896340736 + 6755399441055744.0, n = shifted - 6755399441055744.0;
  const Vec<double> y = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  Vec<double> p = broadcast(1.0);
  for (int k = 14; k >= 2; --k) p = p * y * (1.0 / k) + 1.0;
  const Vec<double> power = (Vec<double>)(((Int)shifted << 52) + (int64_t{1023} << 52));
  return p * y * power + (power - 1.0);
}

// How tensors are stored. Kernels compute in float (double for double) and round once, on the way out.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeType<S>::type;

inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return from_bits(uint32_t{x.bits} << 16); }
inline float widen(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Move the exponent's bias by a multiplication, which also makes subnormals right; infinities and NaN by hand.
  const uint32_t magnitude = x.bits & 0x7fffu, sign = uint32_t{x.bits & 0x8000u} << 16;
  const float scaled = from_bits(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude << 13 | 0x7f800000u;
  return from_bits((magnitude >= 0x7c00u ? special : to_bits(scaled)) | sign);
#endif
}

template <class S>
inline S narrow(Compute<S> x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  return {static_cast<uint16_t>(x != x ? bits >> 16 | 0x40u : rounded)};
}
template <>
inline f16 narrow<f16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, 0))};
#else
  const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // subnormal: let the adder align and round, at 2^-24 per unit
    return {static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

template <class T, int64_t... I>
inline Vec<T> first_lanes(Vec<T> v, int64_t count, T rest, std::integer_sequence<int64_t, I...>) {
  using Int = typename Lanes<T>::Int;
  return Int{I...} < (Int{} + static_cast<decltype(Int{}[0] + 0)>(count)) ? v : broadcast(rest);
}

// The first `count` lanes; the others become `rest`.
template <class T>
inline Vec<T> first_lanes(Vec<T> v, int64_t count, T rest) {
  if (count >= kLanes<T>) return v;
  return first_lanes<T>(v, count, rest, std::make_integer_sequence<int64_t, kLanes<T>>{});
}

// A vector's worth of stored elements, widened.
template <class S>
inline Vec<Compute<S>> load_wide(const S* p) {
  if constexpr (sizeof(S) >= 4) {
    return load(p);
  } else {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (std::is_same_v<S, bf16>) return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    else return (Vec<float>)_mm512_cvtph_ps(bits);
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (std::is_same_v<S, bf16>) return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
    else return (Vec<float>)_mm256_cvtph_ps(bits);
#else
    Vec<float> v;
    for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
    return v;
#endif
  }
}

// ... of which only the first `count` may be touched; the rest is 0.
template <class S>
inline Vec<Compute<S>> load_wide(const S* p, int64_t count) {
  if (count >= kLanes<Compute<S>>) return load_wide(p);
#if defined(__AVX512F__)
  const auto lanes = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (std::is_same_v<S, float>) return (Vec<float>)_mm512_maskz_loadu_ps(lanes, p);
  if constexpr (std::is_same_v<S, bf16>) {
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16);
  }
  if constexpr (std::is_same_v<S, f16>) return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
#endif
  S some[kLanes<Compute<S>>] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = p[i];
  return load_wide(some);
}

template <class S>
inline void store_narrow(S* p, Vec<Compute<S>> v) {
  if constexpr (sizeof(S) >= 4) {
    store(p, v);
  } else {
#if defined(__AVX512F__)
    __m256i bits;
    if constexpr (std::is_same_v<S, f16>) {
      bits = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
#if defined(__AVX512BF16__)
      bits = (__m256i)_mm512_cvtneps_pbh((__m512)v);
#else
      const __m512i wide = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(wide, _mm512_set1_epi32(0x7fff)), odd);
      const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
      const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, wide, _mm512_set1_epi32(0x400000));
      bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
#endif
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
#elif defined(__AVX2__)
    __m128i bits;
    if constexpr (std::is_same_v<S, f16>) {
      bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m256i wide = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(wide, _mm256_set1_epi32(0x7fff)), odd);
      const __m256i quiet = _mm256_or_si256(wide, _mm256_set1_epi32(0x400000));
      const __m256 nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
      const __m256i all = _mm256_srli_epi32((__m256i)_mm256_blendv_ps((__m256)rounded, (__m256)quiet, nan), 16);
      bits = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
#else
    for (int64_t i = 0; i < kLanes<float>; ++i) p[i] = narrow<S>(v[i]);
#endif
  }
}

template <class S>
inline void store_narrow(S* p, Vec<Compute<S>> v, int64_t count) {
  if (count >= kLanes<Compute<S>>) return store_narrow(p, v);
  S some[kLanes<Compute<S>>];
  store_narrow(some, v);
#if defined(__AVX512F__)
  const auto lanes = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(p, lanes, (__m512)v);
  if constexpr (sizeof(S) == 2) {
    return _mm256_mask_storeu_epi16(p, lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(some)));
  }
#endif
  for (int64_t i = 0; i < count; ++i) p[i] = some[i];
}

// out[i] = in[i] * scale, rounded once; reads whole vectors.
template <class S, class T = Compute<S>>
inline void pack(const T* in, int64_t n, T scale, S* out) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store_narrow(out + i, load(in + i) * scale);
  if (i < n) store_narrow(out + i, load(in + i) * scale, n - i);
}

}  // namespace vitkd::cpu::VITKD_ISA
