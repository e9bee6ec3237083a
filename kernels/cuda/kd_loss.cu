// Distillation losses of rows of logits, their mean and their gradients, in one launch. A team of threads, a warp or a
// block, holds a row of up to 4096 classes in registers; a longer one is read again for each sweep.
//
// 4096 x 1000 in bfloat16 are 33 MB, 6.8 us of an H200's 4.8 TB/s. In that time its 528 schedulers (1.755 GHz) issue 49
// instructions for 32 pairs of logits, 98 in float32. By the machine code for sm_90, both gradients wanted, kl takes 29
// (two warps a row took 34), js 54: kl leaves the time to memory. What brings it there is one exponential per logit, kept
// in its register for the gradients (five cost 98 instructions), the kind known to the compiler, and that what is of a
// row, addresses, two reductions, two reciprocals and a logarithm, is shared by the 32 pairs of a thread.
#include "../kernels.h"
#include "device.cuh"
#include "slots.cuh"

#include <utility>

namespace vitkd::cuda {
namespace {

// What the kernels read of KDLoss, with the divisions and the double arithmetic done.
struct Arguments {
  const void *student, *teacher;
  float* loss;
  float* mean;  // or null
  int slot;     // of `counters`, with a mean
  void *student_grad, *teacher_grad;
  int64_t rows, classes, student_stride, teacher_stride;
  float temperature, weight;
  float scale_e, scale_2;  // 1 / temperature, log2(e) / temperature
  bool l1;                 // or mse; for kd_difference_kernel alone
  bool vectors;            // every run of 16 bytes starts on a multiple of 16
};

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <int kCount>
struct alignas(kCount == 1 ? 4 : kCount == 2 ? 8 : 16) Values {
  float of[kCount];

  __device__ void operator+=(const Values& other) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) of[i] += other.of[i];
  }
};

// Shared memory of a block: for each warp, what it adds to each of the three reductions that a row can need. They do
// not share a place, so that one barrier per reduction is enough.
enum Place { kLargest = 0, kMeans = 2, kSums = 4, kPlaces = 8 };
constexpr size_t shared_bytes(int threads) { return threads > kWarp ? threads / kWarp * kPlaces * sizeof(float) : 0; }

// The same results in every thread of the team, whatever the order in which they run. Several values at once cost
// little more time than one: the shuffles of one fill the latency of another's.
template <int kTeam, Place kPlace, class Combine, int kCount>
__device__ void reduce(Values<kCount>& values, Combine combine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
#pragma unroll
    for (float& value : values.of) value = combine(value, shuffle_xor(value, mask));
  if constexpr (kTeam > kWarp) {
    float* const shared = shared_memory<float>() + kPlace;
    auto of_warp = [&](int warp) { return reinterpret_cast<Values<kCount>*>(shared + warp * kPlaces); };
    if (threadIdx.x % kWarp == 0) *of_warp(threadIdx.x / kWarp) = values;
    __syncthreads();
    values = *of_warp(0);
#pragma unroll
    for (int warp = 1; warp < kTeam / kWarp; ++warp) {
      const Values<kCount> others = *of_warp(warp);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values.of[i] = combine(values.of[i], others.of[i]);
    }
  }
}

// At the top of a kernel. Whoever comes next may have what room is left, since it waits for the end of all blocks.
__device__ void begin() {
  wait_for_earlier();
  let_later_start();
}

// Blocks that have their losses stored, of each launch that may run now.
__device__ unsigned counters[kSlots];

// Once a block's losses are stored, by thread 0 if they are of one row; what comes back is thread 0's to hand to
// finish_mean. Gradients are stored between the two: the count does not wait for them, nor they for its answer.
template <int kTeams>
__device__ unsigned count_block(const Arguments& p) {
  unsigned before = 0xffffffff;
  if (p.mean) {
    if (kTeams > 1) __syncthreads();
    if (threadIdx.x == 0) before = count_call(&counters[p.slot], gridDim.x);
  }
  return before;
}

// A thread's share of the losses' sum: kCount of them, all on their way at once.
template <int kThreads, int kCount>
__device__ float sum_of_losses(const float* loss, int begin, int rows) {
  float losses[kCount] = {}, parts[4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (begin + i * kThreads < rows) losses[i] = load_of_blocks(loss + begin + i * kThreads);
#pragma unroll
  for (int i = 0; i < kCount; ++i) parts[i % 4] += losses[i];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// The mean of the losses by one block, whichever it is in the same order. The loads' latency is what takes time, so that
// there are 2048 at a time or more, whatever the number of threads.
template <int kThreads>
__device__ void store_mean(const float* loss, int rows, float* mean) {
  constexpr int kFew = 8, kMany = kThreads * kFew < 2048 ? 2048 / kThreads : kFew;
  Values<1> total;
  if (rows <= kThreads * kFew) {
    total.of[0] = sum_of_losses<kThreads, kFew>(loss, threadIdx.x, rows);
  } else {
    double sum = 0;
    for (int begin = threadIdx.x; begin < rows; begin += kThreads * kMany)
      sum += sum_of_losses<kThreads, kMany>(loss, begin, rows);
    total.of[0] = static_cast<float>(sum);
  }
  reduce<kThreads, kMeans>(total, Sum{});
  if (threadIdx.x == 0) *mean = total.of[0] / static_cast<float>(rows);
}

// The last block's work, after all else.
template <int kThreads>
__device__ void finish_mean(const Arguments& p, unsigned before) {
  if (p.mean && any_of_block(before == gridDim.x - 1)) store_mean<kThreads>(p.loss, static_cast<int>(p.rows), p.mean);
}

// The mean where the blocks of the launch before cannot count themselves, or one of them would take long.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) kd_mean_kernel(const T* loss, int rows, T* mean) {
  wait_for_earlier();
  store_mean<kThreads>(loss, rows, mean);
}

// An exponential is a power of 2 where logits are half precision and a row has many: one instruction, off by 2 ulp at
// most where rounding the logit was off by 2^15, and a loss of hundreds of classes sees the mean of these errors.
// float32, which has twice the time, and rows of few classes take powers of e, to 1 ulp in 8 instructions.
template <bool kPowerOf2>
__device__ float exponential(float x) {
  if constexpr (kPowerOf2) return fast_exp2(x);
  else return expf(x);
}

// log((1 + x) / 2) for x in [0, 1], as 2 artanh((x - 1) / (x + 3)): within 3e-9 and some roundings of the result itself,
// not of 1, since networks that converge have only x near 1, where the result is small and an error of the polynomial
// would be a bias. Exactly 0 at 1, so that equal logits have no divergence.
__device__ float log_half_1p(float x) {
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

// kl and js of a row that fits the team's registers. (Without the 1, ptxas spills four bytes of js for sm_100.)
template <class T, int kTeam, int kHeld, int kRun, int kKind>
__global__ void __launch_bounds__(threads_of_block(kTeam, kHeld), 1) kd_loss_kernel(const Arguments p) {
  begin();
  Row<T, kTeam, kHeld, kRun, kKind> row{p};
  const auto piece = row.piece(0);
  typename decltype(row)::Pairs x;
  if (row.exists()) {
    row.load(piece, x, 0);
    row.largest = row.largest_with(piece, x);
    reduce<kTeam, kLargest>(row.largest, Max{});
    row.sums = row.exponentiate(piece, x);
    row.finish_sums();
    if (row.kTwoRounds) {
      row.means = row.compare(piece, x);
      row.finish_means();
    }
    row.store_loss();
  }
  const unsigned before = count_block<row.kTeams>(p);
  if (row.exists()) row.store_gradients(piece, x, 0);
  finish_mean<row.kThreads>(p, before);
}

// The same with no more blocks than run at once, each a warp, for rows of whole vectors. While a warp works on a row its
// next one comes to shared memory, every thread's part to where only that thread reads it. The same arithmetic, so that
// the results are the same bits.
template <class T, int kTeam, int kHeld, int kRun, int kKind>
__global__ void __launch_bounds__(kTeam, 16) kd_loss_ahead_kernel(const Arguments p) {
  begin();
  using Each = Row<T, kTeam, kHeld, kRun, kKind>;
  static_assert(kTeam == kWarp && Each::kTeams == 1 && kRun == kVector<T>, "no barriers, and whole vectors");
  const typename Each::Piece piece = {static_cast<int>(threadIdx.x), static_cast<int>(p.classes), true};
  T* const student = shared_memory<T>();
  T* const teacher = student + kTeam * kHeld;
  auto fetch = [&](int64_t index) {
    if (index >= p.rows) return;
    const Each row{p, index};
    const T* const from_s = row.student + piece.start(0);
    const T* const from_t = row.teacher + piece.start(0);
#pragma unroll
    for (int run = 0; run < piece.kRuns; ++run) {
      if (!piece.inside(run)) continue;
      copy_async(student + piece.start(run), from_s + run * kTeam * kRun, true);
      copy_async(teacher + piece.start(run), from_t + run * kTeam * kRun, true);
    }
    copy_async_commit();
  };

  typename Each::Pairs x;
  int64_t index = blockIdx.x;
  unsigned before = 0;
  const Each first{p, index};
  piece.load(x.s, x.t, first.student, first.teacher, [&] { fetch(index + gridDim.x); });
  while (true) {
    Each row{p, index};
    row.largest = row.largest_with(piece, x);
    reduce<kTeam, kLargest>(row.largest, Max{});
    row.sums = row.exponentiate(piece, x);
    row.finish_sums();
    row.store_loss();
    index += gridDim.x;
    if (index >= p.rows) before = count_block<1>(p);
    row.store_gradients(piece, x, 0);
    if (index >= p.rows) break;
    copy_async_wait<0>();
    piece.load(x.s, x.t, student, teacher, [] {});
    fetch(index + gridDim.x);
  }
  finish_mean<kTeam>(p, before);
}

// kl and js of any row: the sums in one sweep, by an online softmax of each thread's own, js's means in another, the
// gradients in the last. Every other sweep goes backwards, so that it begins with what the caches still hold: with two
// blocks on each SM, rows of 65,536 classes in bfloat16 are 67 MB, and an H200 has 50 MB of L2.
template <class T, int kTeam, int kHeld, int kRun, int kKind>
__global__ void __launch_bounds__(kTeam, 1024 / kTeam) kd_loss_long_kernel(const Arguments p) {
  begin();
  Row<T, kTeam, kHeld, kRun, kKind> row{p};
  typename decltype(row)::Pairs x;
  bool backwards = false;
  auto sweep = [&](auto body) {
    constexpr int64_t kStep = kTeam * kHeld;
    const int64_t steps = (p.classes + kStep - 1) / kStep;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t begin = (backwards ? steps - 1 - step : step) * kStep;
      const auto piece = row.piece(begin);
      row.load(piece, x, begin);
      body(piece, begin);
    }
    backwards = !backwards;
  };

  sweep([&](const auto& piece, int64_t) {
    row.move_largest(row.largest_with(piece, x));
    row.sums += row.exponentiate(piece, x);
  });
  Values<2> largest = row.largest;
  reduce<kTeam, kLargest>(largest, Max{});
  row.move_largest(largest);
  row.finish_sums();
  if (row.kTwoRounds) {
    sweep([&](const auto& piece, int64_t) {
      row.exponentiate(piece, x);
      row.means += row.compare(piece, x);
    });
    row.finish_means();
  }
  row.store_loss();
  const unsigned before = count_block<1>(p);
  if (p.student_grad || p.teacher_grad) {
    sweep([&](const auto& piece, int64_t begin) {
      row.exponentiate(piece, x);
      if (row.kTwoRounds) row.compare(piece, x);
      row.store_gradients(piece, x, begin);
    });
  }
  finish_mean<kTeam>(p, before);
}

// l1 and mse of any row, in one sweep: a gradient needs its own pair of logits alone.
template <class T, int kTeam, int kHeld, int kRun>
__global__ void __launch_bounds__(threads_of_block(kTeam, kHeld)) kd_difference_kernel(const Arguments p) {
  begin();
  Row<T, kTeam, kHeld, kRun, 0> row{p};
  const float per_class = 1 / static_cast<float>(p.classes);
  typename decltype(row)::Pairs x;
  Values<1> loss = {};
  for (int64_t begin = 0; begin < p.classes && row.exists(); begin += kTeam * kHeld) {
    const auto piece = row.piece(begin);
    row.load(piece, x, begin);
    float part = 0;
    piece.each([&](int i) {
      const float difference = x.s[i] - x.t[i];
      const float sign = static_cast<float>((difference > 0) - (difference < 0));
      part += p.l1 ? fabsf(difference) : difference * difference;
      x.s[i] = (p.l1 ? sign : 2 * difference) * per_class * p.weight;
    });
    loss.of[0] += part;
    const int64_t offset = row.index * p.classes + begin;
    if (p.student_grad) piece.store(static_cast<T*>(p.student_grad) + offset, [&](int i) { return x.s[i]; });
    if (p.teacher_grad) piece.store(static_cast<T*>(p.teacher_grad) + offset, [&](int i) { return -x.s[i]; });
  }
  reduce<kTeam, kSums>(loss, Sum{});
  if (row.member == 0 && row.exists()) p.loss[row.index] = loss.of[0] / static_cast<float>(p.classes);
  finish_mean<row.kThreads>(p, count_block<row.kTeams>(p));
}

// kd_loss_ahead_kernel's: a row of both sides.
template <class T>
constexpr size_t ahead_bytes(int team, int held) {
  return 2 * team * held * sizeof(T);
}

constexpr int64_t kMostRows = 8192;  // of which one block of the launch takes the mean sooner than another launch would

const char* queue_blocks(void (*kernel)(Arguments), int64_t blocks, int threads, size_t bytes, Arguments p,
                         void* stream) {
  constexpr int kMeanThreads = 1024;
  float* const mean = p.mean;
  if (p.mean) p.slot = p.rows <= kMostRows ? slot_for(stream) : -1;
  if (p.slot < 0) p.mean = nullptr;
  const char* error = launch_early(kernel, blocks, threads, bytes, stream, p);
  if (error || !mean || p.mean) return error;
  return launch_early(kd_mean_kernel<float, kMeanThreads>, 1, kMeanThreads, shared_bytes(kMeanThreads), stream,
                      static_cast<const float*>(p.loss), static_cast<int>(p.rows), mean);
}

template <int kTeam, int kHeld>
const char* queue_rows(void (*kernel)(Arguments), const Arguments& p, void* stream) {
  constexpr int kThreads = threads_of_block(kTeam, kHeld), kRows = kThreads / kTeam;
  return queue_blocks(kernel, (p.rows + kRows - 1) / kRows, kThreads, shared_bytes(kThreads), p, stream);
}

// By kd_loss_ahead_kernel; false where it may not.
template <class T, int kRun>
bool queue_ahead(const Arguments& p, void* stream, const char*& error) {
  if constexpr (kRun == kVector<T>) {
    if (!p.vectors) return false;
    const auto kernel = kd_loss_ahead_kernel<T, kWarp, 32, kRun, static_cast<int>(KDKind::kl)>;
    constexpr size_t kBytes = ahead_bytes<T>(kWarp, 32);
    const int64_t blocks = resident_blocks(kernel, kWarp, kBytes);
    error = queue_blocks(kernel, p.rows < blocks ? p.rows : blocks, kWarp, kBytes, p, stream);
    return true;
  } else {
    return false;
  }
}

// By a block for each row, four warps, where the GPU has all rows at once: each is done sooner. False where it has not.
template <class T, int kRun, int kKind>
bool queue_few(const Arguments& p, void* stream, const char*& error) {
  const auto kernel = kd_loss_kernel<T, 128, 8, kRun, kKind>;
  if (p.rows > resident_blocks(kernel, 128, shared_bytes(128))) return false;
  error = queue_rows<128, 8>(kernel, p, stream);
  return true;
}

// kl of up to 1024 half-precision classes goes to one warp, 32 a thread: 125 vectors of bfloat16 fill 98 % of their 128
// places, no barrier, and what is of a row and not of a pair is done once. At 120 registers an SM has 17 rows of 4 KB
// on their way, so that 4096 rows are not three turns of its 132, as with two warps a row and 14 rows, but two. js would
// not fit the registers of one warp, and float32 would sum 32 terms in a row where 16 are as precise as the formula.
template <class T, int kRun, int kKind>
const char* queue_softmax(const Arguments& p, void* stream) {
  if (p.classes <= 256) return queue_rows<32, 8>(kd_loss_kernel<T, 32, 8, kRun, kKind>, p, stream);
  if (p.classes <= 1024) {
    const char* error = nullptr;
    if (queue_few<T, kRun, kKind>(p, stream, error)) return error;
    if constexpr (sizeof(T) == 2 && kKind == static_cast<int>(KDKind::kl)) {
      if (queue_ahead<T, kRun>(p, stream, error)) return error;
      return queue_rows<32, 32>(kd_loss_kernel<T, 32, 32, kRun, kKind>, p, stream);
    } else return queue_rows<64, 16>(kd_loss_kernel<T, 64, 16, kRun, kKind>, p, stream);
  }
  if (p.classes <= 4096) return queue_rows<256, 16>(kd_loss_kernel<T, 256, 16, kRun, kKind>, p, stream);
  return queue_rows<512, 8>(kd_loss_long_kernel<T, 512, 8, kRun, kKind>, p, stream);
}

template <class T, int kRun>
const char* queue_kind(KDKind kind, const Arguments& p, void* stream) {
  if (kind == KDKind::kl) return queue_softmax<T, kRun, static_cast<int>(KDKind::kl)>(p, stream);
  if (kind == KDKind::js) return queue_softmax<T, kRun, static_cast<int>(KDKind::js)>(p, stream);
  if (p.classes <= 256) return queue_rows<32, 8>(kd_difference_kernel<T, 32, 8, kRun>, p, stream);
  if (p.classes <= 1024) return queue_rows<64, 16>(kd_difference_kernel<T, 64, 16, kRun>, p, stream);
  return queue_rows<256, 16>(kd_difference_kernel<T, 256, 16, kRun>, p, stream);
}

template <class T>
const char* queue(KDLoss p, void* stream) {
  if (p.kind == KDKind::reverse_kl) {  // kl with the sides exchanged
    std::swap(p.student, p.teacher);
    std::swap(p.student_stride, p.teacher_stride);
    std::swap(p.student_grad, p.teacher_grad);
    p.kind = KDKind::kl;
  }
  const bool vectors = fits_vectors(sizeof(T), {p.student, p.teacher, p.student_grad, p.teacher_grad},
                                    {p.student_stride, p.teacher_stride});
  const Arguments arguments = {p.student,
                               p.teacher,
                               static_cast<float*>(p.loss),
                               static_cast<float*>(p.mean),
                               0,
                               p.student_grad,
                               p.teacher_grad,
                               p.rows,
                               p.classes,
                               p.student_stride,
                               p.teacher_stride,
                               static_cast<float>(p.temperature),
                               static_cast<float>(p.weight),
                               static_cast<float>(1 / p.temperature),
                               static_cast<float>(kLog2E / p.temperature),
                               p.kind == KDKind::l1,
                               vectors};
  if (p.classes % kVector<T> == 0) return queue_kind<T, kVector<T>>(p.kind, arguments, stream);
  return queue_kind<T, 1>(p.kind, arguments, stream);
}

}  // namespace

const char* kd_loss(const KDLoss& p, void* stream) {
  if (p.rows == 0 || p.classes == 0) return nullptr;
  switch (p.dtype) {
    case DType::float32: return queue<float>(p, stream);
    case DType::bfloat16: return queue<bfloat16>(p, stream);
    case DType::float16: return queue<float16>(p, stream);
    default: return "unsupported dtype: the CUDA kd_loss takes float32, bfloat16 and float16";
  }
}

}  // namespace vitkd::cuda
