// AVX-512's instructions for bfloat16 in plain C++. Included after avx512_emulated.h, before all else.
#pragma once

namespace avx512_emulated {

inline uint16_t bfloat16(float x) {  // to the nearest, ties to even; NaN quiet; subnormals become 0
  auto bits = as<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if ((bits & 0x7f800000) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float widened(uint16_t x) { return as<float>(uint32_t{x} << 16); }

inline __m256bh cvtneps_pbh(__m512 v) {
  const auto x = as<Floats>(v);
  Halves out;
  for (int i = 0; i < 16; ++i) out.at[i] = bfloat16(x.at[i]);
  return as<__m256bh>(out);
}
inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  const auto x = as<Floats>(low), y = as<Floats>(high);
  ManyHalves out;
  for (int i = 0; i < 16; ++i) out.at[i] = bfloat16(x.at[i]), out.at[i + 16] = bfloat16(y.at[i]);
  return as<__m512bh>(out);
}
inline __m512 dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  const auto s = as<Floats>(sums);
  const auto x = as<ManyHalves>(a), y = as<ManyHalves>(b);
  const auto product = [&](int i) { return widened(x.at[i]) * widened(y.at[i]); };
  return each([&](int i) { return s.at[i] + product(2 * i + 1) + product(2 * i); });
}

}  // namespace avx512_emulated

#undef _mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_cvtneps_pbh avx512_emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh avx512_emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps avx512_emulated::dpbf16_ps
#define __AVX512BF16__ 1
