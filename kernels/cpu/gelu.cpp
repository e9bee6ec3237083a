// GELU on the CPU, x Φ(x), and its gradient: one exponential for both, where torch takes erf and exp.
#include "../kernels.h"
#include "shares.h"
#include "simd.h"

namespace vitkd::cpu::VITKD_ISA {

namespace {

// At |x|, the normal distribution: its density without 1 / sqrt(2π), and Φ(-|x|).
struct Normal {
  Vec<float> bell, tail;
};

// Φ(-t) = e^(-t²/2) R(t), R(t) a polynomial in u = 1 / (1 + p t), as in Abramowitz and Stegun's 7.1.26. The
// coefficients are a minimax fit on [0, 14]: relative error 1e-7, so that it holds far into the tail, where 1 + erf has
// lost it all; or 4e-5, and 9e-5 of the exponential, where the result is rounded to bfloat16.
template <bool coarse>
inline Normal normal(Vec<float> x) {
  const Vec<float> size = maximum<float>(x, -x), u = 1.0f / (size * (coarse ? 0.38f : 0.30384615f) + 1.0f);
  const Vec<float> power = x * x * -0.72134752f;
  Vec<float> bell, r;
  if constexpr (coarse) {
    bell = exp2_coarse(power);
    r = broadcast(-0.08992544f);
    r = r * u + 0.18887006f;
    r = r * u + 0.091984693f;
    r = r * u + 0.15782789f;
    r = r * u + 0.15122531f;
  } else {
    bell = exp2(power);
    r = broadcast(0.03658787f);
    r = r * u - 0.15445886f;
    r = r * u + 0.19118531f;
    r = r * u - 0.0421349f;
    r = r * u + 0.12302176f;
    r = r * u + 0.10254116f;
    r = r * u + 0.12208256f;
    r = r * u + 0.12117509f;
  }
  return {bell, bell * (r * u)};
}

template <bool coarse>
inline Vec<float> value(Vec<float> x) {
  const Vec<float> tail = normal<coarse>(x).tail;
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

template <bool coarse>
inline Vec<float> slope(Vec<float> x) {
  const Normal at = normal<coarse>(x);
  return (x < 0.0f ? at.tail : 1.0f - at.tail) + x * at.bell * 0.39894228f;
}

template <class S>
void piece(const Gelu& args, int64_t begin, int64_t end) {
  const S *x = static_cast<const S*>(args.x), *grad = static_cast<const S*>(args.grad);
  S* out = static_cast<S*>(args.out);
  constexpr bool coarse = std::is_same_v<S, bf16>;
  const auto vector = [&](int64_t i, auto count) {
    const Vec<float> in = load_wide(x + i, count);
    store_narrow(out + i, grad ? load_wide(grad + i, count) * slope<coarse>(in) : value<coarse>(in), count);
  };
  constexpr int64_t lanes = kLanes<float>;
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) vector(i, std::integral_constant<int64_t, lanes>{});
  if (i < end) vector(i, end - i);
}

template <class S>
void run(const Gelu& args, ParallelFor parallel_for) {
  Shares elements(args.count, 8192);  // some ten microseconds of work for a thread
  elements.among(parallel_for, [&](Shares::Walk walk) {
    for (Range mine = walk.take(); !mine.empty(); mine = walk.take()) piece<S>(args, mine.begin, mine.end);
  });
}

}  // namespace

void gelu(const Gelu& args, ParallelFor parallel_for) {
#if defined(__AVX512BF16__)  // this instruction set is asked for bfloat16 alone
  run<bf16>(args, parallel_for);
#else
  switch (args.dtype) {
    case DType::float32: return run<float>(args, parallel_for);
    case DType::bfloat16: return run<bf16>(args, parallel_for);
    default: return run<f16>(args, parallel_for);
  }
#endif
}

}  // namespace vitkd::cpu::VITKD_ISA
