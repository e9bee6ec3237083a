// How the rows of one head (tokens x channels, strided, as stored) become operands of its products.
//
// A product sums over channels or over tokens. Elements that meet in a sum lie `kSteps` to an element of In: one by one
// for floats, in pairs for bfloat16; where the last of them has no neighbour, its neighbour is zero.
#pragma once

#include "../kernels.h"
#include "gemm.h"

#if defined(__AMX_BF16__)
#define VITKD_AMX 1
#include "amx.h"
#endif

namespace vitkd::cpu::VITKD_ISA {

template <class In>
constexpr int64_t steps(int64_t n) {
  return (n + kSteps<In> - 1) / kSteps<In>;
}

// Whole tiles of the product's engine: memory for so many rows and, filled up with zeros, so deep. A strip of queries,
// which is columns of one product and depth of the next, is a whole number of vectors.
#if defined(VITKD_AMX)
template <class In>
constexpr int64_t kTileOf = std::is_same_v<In, Pair> ? kTile : 1;
#else
struct Tiles {};
template <class In>
constexpr int64_t kTileOf = 1;
#endif

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class In>
int64_t tile_rows(int64_t rows) {
  return round_up(rows, kTileOf<In>);
}

template <class In>
int64_t tile_depth(int64_t terms) {
  return round_up(steps<In>(terms), kTileOf<In>);
}

template <class In>
void clear(In* rows, int64_t first, int64_t last, int64_t width) {
  if (first < last) __builtin_memset(static_cast<void*>(rows + first * width), 0, (last - first) * width * sizeof(In));
}

// What comes after the first `filled` elements of each row, both a whole number of vectors of queries.
template <class In>
void clear_end(In* matrix, int64_t rows, int64_t filled, int64_t row) {
  constexpr int64_t unit = kLanes<SumOf<In>> / kSteps<In>;
  for (int64_t i = 0; i < rows; ++i, matrix += row) {
    for (int64_t k = filled; k < row; k += unit) __builtin_memset(static_cast<void*>(matrix + k), 0, unit * sizeof(In));
  }
}

#if defined(__AVX512BF16__)
inline __mmask32 first(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : count <= 0 ? 0 : (__mmask32{1} << count) - 1;
}

// Sixteen pairs of neighbours in one row, of which the first `count` elements may be touched.
template <class S>
inline Vec<float> load_pairs(const S* p, int64_t count) {
  const __mmask32 some = first(count);
  if constexpr (std::is_same_v<S, bf16>) {
    return (Vec<float>)_mm512_maskz_loadu_epi16(some, p);
  } else {
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(some), p);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(some >> 16), p + 16);
    return (Vec<float>)_mm512_cvtne2ps_pbh(high, low);
  }
}

// Lane by lane, the two as one pair.
inline Vec<float> join(Vec<float> low, Vec<float> high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec<float>)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#endif

template <class In>
inline void store_operand(In* p, Vec<SumOf<In>> v) {
  store(reinterpret_cast<SumOf<In>*>(p), v);
}

template <class S, class In>
inline Vec<SumOf<In>> load_operand(const S* p, int64_t count) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<In, Pair>) return load_pairs(p, count);
  else
#endif
    return load_wide(p, count);
}

template <class In>
inline Vec<SumOf<In>> broadcast_operand(In x) {
  if constexpr (std::is_same_v<In, Pair>) {
    using Int = Lanes<float>::Int;
    return (Vec<float>)(Int{} + static_cast<int32_t>(x.bits));  // a float sum would not keep every bit
  } else {
    return broadcast(x);
  }
}

// Row by row, `width` elements of In each: for sums over channels.
template <class S, class In>
void pack_rows(const S* in, int64_t stride, int64_t rows, int64_t head_dim, In* out, int64_t width) {
  constexpr int64_t lanes = kLanes<SumOf<In>>, taken = lanes * kSteps<In>;
  for (int64_t n = 0; n < rows; ++n, in += stride, out += width) {
    int64_t d = 0;
    for (; d + taken <= head_dim; d += taken) store_operand(out + d / kSteps<In>, load_operand<S, In>(in + d, taken));
    if (d < head_dim) store_operand(out + d / kSteps<In>, load_operand<S, In>(in + d, head_dim - d));
  }
}

// Pairs take no scale but its sign.
template <class In>
inline Vec<SumOf<In>> scaled(Vec<SumOf<In>> v, SumOf<In> scale) {
  if constexpr (!std::is_same_v<In, Pair>) return v * scale;
  else return scale < 0 ? (Vec<float>)((Lanes<float>::Int)v ^ int32_t(0x80008000)) : v;
}

// The rows as columns, out[d * columns + n]: for sums over channels, the other side. Columns past the last row repeat
// it, so that they go bad only where it does.
template <class S, class In>
void pack_across(const S* in, int64_t stride, int64_t rows, int64_t head_dim, SumOf<In> scale, In* out,
                 int64_t columns) {
  using T = SumOf<In>;
  constexpr int64_t lanes = kLanes<T>, taken = lanes * kSteps<In>;
  const int64_t depth = steps<In>(head_dim);
  for (int64_t n = 0; n < columns; n += lanes) {
    const bool alone = n + 1 >= rows;  // as the class token makes it: one query in a vector of its own
    for (int64_t d = 0; d < depth; d += lanes) {
      const S* from = in + d * kSteps<In>;
      const int64_t left = head_dim - d * kSteps<In>;
      Vec<T> block[lanes];
      if (alone) {
        In row[lanes];
        store_operand(row, load_operand<S, In>(from + (rows - 1) * stride, left));
        VITKD_UNROLL
        for (int64_t i = 0; i < lanes; ++i) block[i] = broadcast_operand(row[i]);
      } else {
        const auto fill = [&](auto count) {
          VITKD_UNROLL
          for (int64_t i = 0; i < lanes; ++i) {
            block[i] = load_operand<S, In>(from + (n + i < rows ? n + i : rows - 1) * stride, count);
          }
        };
        if (left >= taken) fill(std::integral_constant<int64_t, taken>{});
        else fill(left);
        transpose<T>(block);
      }
      VITKD_UNROLL
      for (int64_t i = 0; i < lanes; ++i) {
        if (d + i >= depth) break;
        store_operand(out + (d + i) * columns + n, scaled<In>(block[i], scale));
      }
    }
  }
  clear(out, depth, tile_depth<In>(head_dim), columns);
}

#if defined(__AVX512BF16__)
// The elements of two rows of 32, as load_pairs has them, with each its neighbour below: those of the first 16 columns,
// then the others.
inline void pair_up(Vec<float> above, Vec<float> below, Vec<float> (&pairs)[2]) {
  constexpr std::integer_sequence<int64_t, 0, 4, 1, 5, 2, 6, 3, 7> spread{};  // unpacking takes half of each 16 bytes
  const Vec<double> a = shuffle<double>((Vec<double>)above, (Vec<double>)above, spread);
  const Vec<double> b = shuffle<double>((Vec<double>)below, (Vec<double>)below, spread);
  pairs[0] = (Vec<float>)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
  pairs[1] = (Vec<float>)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}
#endif

// As they are, or two rows to one row of pairs: for sums over tokens.
template <class S, class In>
void pack_down(const S* in, int64_t stride, int64_t rows, int64_t head_dim, In* out, int64_t width) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<In, Pair>) {
    constexpr int64_t lanes = kLanes<float>;
    for (int64_t n = 0; n < rows; n += 2, in += 2 * stride, out += width) {
      const auto columns = [&](int64_t d, auto count) {
        const Vec<float> below = n + 1 < rows ? load_pairs(in + stride + d, count) : Vec<float>{};
        Vec<float> pairs[2];
        pair_up(load_pairs(in + d, count), below, pairs);
        store_operand(out + d, pairs[0]);
        if (d + lanes < width) store_operand(out + d + lanes, pairs[1]);
      };
      int64_t d = 0;
      for (; d + 2 * lanes <= head_dim; d += 2 * lanes) columns(d, std::integral_constant<int64_t, 2 * lanes>{});
      if (d < head_dim) columns(d, head_dim - d);
    }
    clear(out, 0, tile_depth<In>(rows) - steps<In>(rows), width);
    return;
  }
#endif
  pack_rows(in, stride, rows, head_dim, out, width);
}

// Rows as a product takes them: where they are stored if it can read them there, else packed into `room`.
template <class In>
struct Operand {
  const In* rows;
  int64_t stride;
};

// Whether rows `stride` bytes apart stay in a cache whose sets repeat every `period` bytes: no more than so many of
// them begin in the same set.
inline bool spread(int64_t rows, int64_t stride, int64_t period, int64_t ways) {
  return rows * (stride & -stride) <= ways * period;
}

// ... in the second level, for what every strip of queries comes by again.
inline bool stay_near(int64_t rows, int64_t stride) { return spread(rows, stride, 64 << 10, 8); }

// ... in the first, for what every tile does, with pages that leave the first TLB's 64 entries some room.
inline bool stay_close(int64_t rows, int64_t stride) {
  return rows * stride <= 160 << 10 && spread(rows, stride, 4 << 10, 5);
}

// For the side of a product that is read element by element.
template <class S, class In>
Operand<In> by_elements(const S* in, int64_t stride, int64_t rows, int64_t head_dim, In* room) {
  if constexpr (std::is_same_v<In, S>) {
    if (stay_near(rows, stride * int64_t{sizeof(S)})) return {in, stride};
  }
  if constexpr (std::is_same_v<In, Pair> && std::is_same_v<S, bf16> && kTileOf<In> == 1) {  // neighbours are pairs
    const bool whole = head_dim % 2 == 0 && stride % 2 == 0 && reinterpret_cast<uintptr_t>(in) % sizeof(Pair) == 0;
    if (whole && stay_near(rows, stride * int64_t{sizeof(S)})) return {reinterpret_cast<const Pair*>(in), stride / 2};
  }
  const int64_t width = pad<SumOf<In>>(steps<In>(head_dim));
  pack_rows(in, stride, rows, head_dim, room, width);
  return {room, width};
}

// For the side that is read by vectors, by every tile anew.
template <class S, class In>
Operand<In> by_vectors(const S* in, int64_t stride, int64_t rows, int64_t head_dim, In* room) {
  const int64_t width = pad<SumOf<In>>(head_dim);
  if constexpr (std::is_same_v<In, S>) {
    if (width == head_dim && stay_close(rows, stride * int64_t{sizeof(S)})) return {in, stride};
  }
  pack_down(in, stride, rows, head_dim, room, width);
  return {room, width};
}

// Rows of a result: a product leaves them where they belong if it can, else in `room`, from where `finish` moves them.
// A product of pairs can if it does so once, for bfloat16 is not added to; on tiles, which are stored whole, it cannot.
template <class S, class In>
struct Result {
  using T = SumOf<In>;
  static constexpr bool narrowed = std::is_same_v<S, bf16> && std::is_same_v<In, Pair> && kTileOf<In> == 1;
  S* out;
  int64_t out_stride, head_dim;
  Finish<T> last;
  T* rows;
  int64_t stride;
  bool in_place = false;

  // `count` rows, which products write `times` times, and what is done to them at last.
  Result(S* out, int64_t out_stride, int64_t head_dim, T* room, int64_t count, int64_t times, Finish<T> last)
      : out(out), out_stride(out_stride), head_dim(head_dim), last(last), rows(room), stride(pad<T>(head_dim)) {
    if (stride != head_dim) return;
    if constexpr (std::is_same_v<S, In>) in_place = times == 1 || stay_near(count, out_stride * int64_t{sizeof(S)});
    else in_place = narrowed && times == 1;
    if (in_place) rows = reinterpret_cast<T*>(out), stride = out_stride;
  }

  // ... if the product can do it,
  Finish<T> in_product() const {
    if (!in_place) return {};
    Finish<T> finish = last;
    finish.narrowed = narrowed;
    return finish;
  }

  // ... and if it cannot.
  void finish(int64_t count) const {
    if (in_place) return;
    for (int64_t i = 0; i < count; ++i) {
      const T factor = last.row_factors != nullptr ? last.row_factors[i] : last.factor;
      pack(rows + i * stride, head_dim, factor, out + i * out_stride);
    }
  }
};

// work(rows): `data` as what it is stored as, `at` elements on; double goes with double, float with all others.
template <class T, class Void, class Work>
void with_rows(DType dtype, Void* data, int64_t at, Work work) {
  const auto as = [&](auto stored) {
    using S = decltype(stored);
    work(static_cast<std::conditional_t<std::is_const_v<Void>, const S, S>*>(data) + at);
  };
  if constexpr (std::is_same_v<T, double>) return as(double{});
  else if (dtype == DType::bfloat16) as(bf16{});
  else if (dtype == DType::float16) as(f16{});
  else as(float{});
}

}  // namespace vitkd::cpu::VITKD_ISA
