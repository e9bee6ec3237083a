// Vectors for the CPU kernels, in GCC's and Clang's vector extension: the same source is compiled once per instruction
// set (VITKD_ISA names the namespace), so a vector is as wide as that set allows. Nothing here may be an inline
// function shared between the sets: the linker would keep one copy, and run AVX-512 code on a CPU without it.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
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

template <class T>
inline T sum(Vec<T> v) {
  T total = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
inline T max(Vec<T> v) {
  T most = v[0];
  for (int64_t i = 1; i < kLanes<T>; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// 2^x for x <= 0, to the last bit or two: 2^x = 2^n 2^f with |f| <= 1/2. NaN stays NaN, below 2^-126 is 0.
inline Vec<float> exp2(Vec<float> x) {
  using Int = Lanes<float>::Int;
  const Vec<float> shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits now hold n
  const Vec<float> f = x - (shifted - 12582912.0f);
  // minimax polynomial of degree 6, relative error 2e-9
  Vec<float> p = broadcast(1.53458104e-4f);
  p = p * f + 1.33999312e-3f;
  p = p * f + 9.61848896e-3f;
  p = p * f + 5.55032878e-2f;
  p = p * f + 2.40226469e-1f;
  p = p * f + 6.93147206e-1f;
  p = p * f + 1.0f;
  const Int bits = (Int)p + ((Int)shifted << 23);
  Vec<float> result = x < -126.0f ? Vec<float>{} : (Vec<float>)bits;
  return x != x ? x : result;
}

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

// out[i] = in[i] * scale, widened; the rest up to `padded` is filled.
template <class S>
inline void unpack(const S* in, int64_t n, Compute<S> scale, Compute<S>* out, int64_t padded, Compute<S> fill) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(in[i]) * scale;
  for (int64_t i = n; i < padded; ++i) out[i] = fill;
}

template <class S>
inline void pack(const Compute<S>* in, int64_t n, Compute<S> scale, S* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<S>(in[i] * scale);
}

}  // namespace vitkd::cpu::VITKD_ISA
