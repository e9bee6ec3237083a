// A row of logits in the registers of its team: what it reads, what it knows, what it writes.
#pragma once

#include "kd_team.cuh"

#include <type_traits>

namespace vitkd::cuda {

// An exponential is a power of 2 where logits are half precision and a row has many: one instruction, off by 2 ulp at
// most where rounding the logit was off by 2^15, and a loss of hundreds of classes sees the mean of these errors.
// float32, which has twice the time, and rows of few classes take powers of e, to 1 ulp in 8 instructions.
template <bool kPowerOf2>
__device__ float exponential(float x) {
  if constexpr (kPowerOf2) return fast_exp2(x);
  else return expf(x);
}

// log((1 + x) / 2) for x in [0, 1], as 2 artanh((x - 1) / (x + 3)): within 3e-9 and some roundings of the result
// itself, not of 1, since networks that converge have only x near 1, where the result is small and an error of the
// polynomial would be a bias. Exactly 0 at 1, so that equal logits have no divergence.
__device__ inline float log_half_1p(float x) {
  const float z = (x - 1) * reciprocal(x + 3), square = z * z;
  float terms = 0.28429255f;
  terms = fmaf(terms, square, 0.2790653f);
  terms = fmaf(terms, square, 0.40028295f);
  terms = fmaf(terms, square, 0.6666627f);
  return z * fmaf(terms, square, 2);
}

// One access to a row: kRun neighbours, as 32-bit words if there are that many, which unpack in an instruction a value.
template <class T, int kRun>
struct alignas(kRun * sizeof(T)) Run {
  static constexpr bool kWords = sizeof(T) == 2 && kRun % 2 == 0;
  static constexpr int kPerWord = kWords ? 2 : 1;
  std::conditional_t<kWords, uint32_t, T> words[kRun / kPerWord];

  __device__ T get(int i) const {
    if constexpr (kWords) return {static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))};
    else return words[i];
  }

  template <class Value>
  __device__ void fill(Value value) {
#pragma unroll
    for (int i = 0; i < kRun / kPerWord; ++i) {
      if constexpr (kWords) words[i] = pack<T>(value(2 * i), value(2 * i + 1));
      else from_float(words[i], value(i));
    }
  }

  __device__ void load(const T* from, bool whole) {
    if (whole) {
      *this = *reinterpret_cast<const Run*>(from);
    } else {
      T values[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) values[i] = from[i];
      __builtin_memcpy(words, values, sizeof words);
    }
  }

  __device__ void store(T* to, bool whole) const {
    if (whole) {
      *reinterpret_cast<Run*>(to) = *this;
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) to[i] = get(i);
    }
  }
};

// Which classes of a row, or of a stretch of it, a thread holds. They come in runs, neighbouring threads hold
// neighbouring runs. A run is 16 bytes where the length of a row is a multiple of that. Where it is not, rows start
// anywhere, and a run is one element: the 64 bytes of a warp's access still fill their sectors, and a pair of bfloat16
// logits takes 54 instructions instead of 35, 10 % more than memory has time for. (Vectors between a scalar head and
// tail would save these, and make a row's sums depend on where it starts.) The choice looks at the number of classes
// alone, so that no stride or address changes a bit of the result.
template <class T, int kTeam, int kHeld, int kRun>
struct Slice {
  static constexpr int kRuns = kHeld / kRun;
  int member;
  int classes;
  bool vectors;

  __device__ int start(int run) const { return (run * kTeam + member) * kRun; }
  __device__ bool inside(int run) const { return start(run) < classes; }  // all of it: classes are whole runs

  // body(i) for each class held.
  template <class Body>
  __device__ void each(Body body) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (!inside(run)) continue;
#pragma unroll
      for (int j = 0; j < kRun; ++j) body(run * kRun + j);
    }
  }

  // Every load of both rows is on its way before the first value is used; `then` comes between.
  template <class Then>
  __device__ void load(float (&s)[kHeld], float (&t)[kHeld], const T* student, const T* teacher, Then then) const {
    Run<T, kRun> students[kRuns] = {}, teachers[kRuns] = {};
    auto load_all = [&](bool whole) {
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        if (!inside(run)) continue;
        students[run].load(student + start(run), whole);
        teachers[run].load(teacher + start(run), whole);
      }
    };
    if (kRun == 1 || vectors) load_all(true);
    else load_all(false);  // an odd stride or address: right, but kRun accesses to the sectors that one would do
    then();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      s[i] = to_float(students[i / kRun].get(i % kRun));
      t[i] = to_float(teachers[i / kRun].get(i % kRun));
    }
  }

  // value(i) to its place in the row.
  template <class Value>
  __device__ void store(T* row, Value value) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (!inside(run)) continue;
      Run<T, kRun> values;
      values.fill([&](int i) { return value(run * kRun + i); });
      values.store(row + start(run), kRun == 1 || vectors);
    }
  }
};

enum Side { kStudent, kTeacher };
constexpr int kDifference = 2, kExcess = 3;

// An SM holds 32 blocks at most, so warps that need few registers share one: 64 instead of 32.
constexpr int threads_of_block(int team, int held) { return team * held <= 256 ? 4 * kWarp : team; }

// A row of logits and what its team knows of it, step by step. q, p: softmax of student and teacher; m: their mean.
// Logits count from the row's largest, which is exact for those that matter; exponents are scale times that.
template <class T, int kTeam, int kHeld, int kRun, int kKind>
struct Row {
  using Piece = Slice<T, kTeam, kHeld, kRun>;
  static constexpr int kThreads = threads_of_block(kTeam, kHeld), kTeams = kThreads / kTeam;
  static constexpr bool kJs = kKind == static_cast<int>(KDKind::js);
  static constexpr bool kShort = kTeam * kHeld <= 256;
  static constexpr bool kTwoRounds = kJs || kShort;  // kl alone can sum p (t - s) before it knows what p sums to
  static constexpr bool kPowerOf2 = sizeof(T) == 2 && !kShort;
  static constexpr float kNats = kPowerOf2 ? 0.6931471805599453f : 1;  // in one unit of an exponent

  const Arguments& p;
  const int64_t index = kTeams == 1 ? blockIdx.x : int64_t{blockIdx.x} * kTeams + threadIdx.x / kTeam;
  const int member = kTeams == 1 ? threadIdx.x : threadIdx.x % kTeam;
  const float scale = kPowerOf2 ? p.scale_2 : p.scale_e;
  const T* const student = static_cast<const T*>(p.student) + index * p.student_stride;
  const T* const teacher = static_cast<const T*>(p.teacher) + index * p.teacher_stride;

  Values<2> largest = {{kLowest, kLowest}};  // not -inf: exp(-inf - largest) must be 0, not NaN
  Values<4> sums = {};     // of both sides' exponentials, the teacher's times t - s, student's less teacher's if kShort
  Values<2> per_sum = {};  // 1 / the first two
  float log_ratio = 0;     // log(student's sum / teacher's), as an exponent
  Values<2> means = {};    // of the ratios in Pairs, weighted by q and p

  // Where several teams share a block, the last ones of the last block may have no row.
  __device__ bool exists() const { return kTeams == 1 || index < p.rows; }

  // The classes from `begin` on, as many as the team holds.
  __device__ Piece piece(int64_t begin) const {
    const int64_t left = p.classes - begin;
    return {member, static_cast<int>(left < kTeam * kHeld ? left : kTeam * kHeld), p.vectors};
  }

  struct Pairs {
    float s[kHeld], t[kHeld];              // logits, then their exponentials
    float ratio_s[kHeld], ratio_t[kHeld];  // js: log(q / m), log(p / m); kl: log(p / q), or t - s in a single round
  };

  __device__ void load(const Piece& piece, Pairs& x, int64_t begin) const {
    piece.load(x.s, x.t, student + begin, teacher + begin, [] {});
  }

  // The largest logits so far of both sides.
  __device__ Values<2> largest_with(const Piece& piece, const Pairs& x) const {
    Values<2> result = largest;
    piece.each([&](int i) {
      result.of[kStudent] = fmaxf(result.of[kStudent], x.s[i]);
      result.of[kTeacher] = fmaxf(result.of[kTeacher], x.t[i]);
    });
    return result;
  }

  // Logits become exponentials; the part of this piece in `sums`.
  __device__ Values<4> exponentiate(const Piece& piece, Pairs& x) const {
    Values<4> part = {};
    piece.each([&](int i) {
      const float s = x.s[i] - largest.of[kStudent], t = x.t[i] - largest.of[kTeacher];
      x.s[i] = exponential<kPowerOf2>(s * scale);
      x.t[i] = exponential<kPowerOf2>(t * scale);
      x.ratio_t[i] = t - s;
      part.of[kStudent] += x.s[i];
      part.of[kTeacher] += x.t[i];
      if (!kTwoRounds) part.of[kDifference] = fmaf(x.t[i], x.ratio_t[i], part.of[kDifference]);
      if (kShort) part.of[kExcess] += x.s[i] - x.t[i];
    });
    return part;
  }

  // Counts the sums from `to`, at least `largest`, instead of from `largest`.
  __device__ void move_largest(const Values<2>& to) {
    const float s = largest.of[kStudent] - to.of[kStudent], t = largest.of[kTeacher] - to.of[kTeacher];
    const float factor = exponential<kPowerOf2>(t * scale);
    if (sums.of[kTeacher] > 0) sums.of[kDifference] += (t - s) * sums.of[kTeacher];  // else t may be -inf
    sums.of[kDifference] *= factor;
    sums.of[kTeacher] *= factor;
    sums.of[kStudent] *= exponential<kPowerOf2>(s * scale);
    largest = to;
  }

  // log(sum of student / sum of teacher). Sums that are near each other have lost what tells them apart, and a short
  // row has time for a sum of differences, which has it: at a temperature of 4 that halves the error of the loss.
  __device__ float log_of_sums() const {
    const float s = sums.of[kStudent], t = sums.of[kTeacher], excess = sums.of[kExcess];
    if (kShort && fabsf(excess) < 0.5f * t) return log1pf(excess / t);
    return logf(s / t);
  }

  // From each thread's sums those of the row, and what follows from them.
  __device__ void finish_sums() {
    reduce<kTeam, kSums>(sums, Sum{});
    per_sum = {1 / sums.of[kStudent], 1 / sums.of[kTeacher]};
    if (kTwoRounds) log_ratio = log_of_sums() / kNats;
    else means.of[kTeacher] = sums.of[kDifference] * per_sum.of[kTeacher];
  }

  // The second round: logarithms of probabilities' ratios; the part of this piece in `means`.
  __device__ Values<2> compare(const Piece& piece, Pairs& x) const {
    Values<2> part = {};
    piece.each([&](int i) {
      const float ratio = fmaf(x.ratio_t[i], scale, log_ratio);
      x.ratio_t[i] = ratio;
      if (kJs) {
        const float of_larger = log_half_1p(exponential<kPowerOf2>(-fabsf(ratio)));  // log(m / max(p, q))
        x.ratio_s[i] = fmaf(fminf(-ratio, 0), kNats, -of_larger);
        x.ratio_t[i] = fmaf(fminf(ratio, 0), kNats, -of_larger);
        part.of[kStudent] = fmaf(x.s[i], x.ratio_s[i], part.of[kStudent]);
      }
      part.of[kTeacher] = fmaf(x.t[i], x.ratio_t[i], part.of[kTeacher]);
    });
    return part;
  }

  __device__ void finish_means() {
    reduce<kTeam, kMeans>(means, Sum{});
    means.of[kStudent] *= per_sum.of[kStudent];
    means.of[kTeacher] *= per_sum.of[kTeacher];
  }

  __device__ void store_loss() const {
    if (member != 0) return;
    float loss = means.of[kTeacher];
    if (!kTwoRounds) loss = loss * p.scale_e + log_of_sums();
    if (kJs) loss = 0.5f * (loss + means.of[kStudent]);
    p.loss[index] = p.temperature * p.temperature * loss;
  }

  __device__ void store_gradients(const Piece& piece, const Pairs& x, int64_t begin) const {
    const int64_t offset = index * p.classes + begin;
    const float factor = p.temperature * p.weight * (kJs ? 0.5f : 1.0f);
    const float of_s = factor * per_sum.of[kStudent], of_t = factor * per_sum.of[kTeacher];
    const float of_ratio = kTwoRounds ? 1 : p.scale_e;  // a kl of one round has not divided t - s by T yet
    const float mean = means.of[kTeacher] * of_ratio;
    if (p.student_grad)
      piece.store(static_cast<T*>(p.student_grad) + offset, [&](int i) {
        if (kJs) return x.s[i] * of_s * (x.ratio_s[i] - means.of[kStudent]);
        return fmaf(x.s[i], of_s, -(x.t[i] * of_t));
      });
    if (p.teacher_grad)
      piece.store(static_cast<T*>(p.teacher_grad) + offset,
                  [&](int i) { return x.t[i] * of_t * fmaf(x.ratio_t[i], of_ratio, -mean); });
  }
};

}  // namespace vitkd::cuda
