// Distillation losses of rows of logits, their mean and their gradients, in one launch. A team of threads, a warp or a
// block, holds a row of up to 4096 classes in registers; a longer one is read again for each sweep.
//
// 4096 x 1000 in bfloat16 are 33 MB, 6.8 us of an H200's 4.8 TB/s. In that time its 528 schedulers (1.755 GHz) issue 49
// instructions for 32 pairs of logits, 98 in float32. By the machine code for sm_90, both gradients wanted, kl takes 29
// (two warps a row took 34), js 54: kl leaves the time to memory. What brings it there is one exponential per logit,
// kept in its register for the gradients (five cost 98 instructions), the kind known to the compiler, and that what is
// of a row, addresses, two reductions, two reciprocals and a logarithm, is shared by the 32 pairs of a thread.
#include "kd_mean.cuh"
#include "kd_row.cuh"

#include <utility>

namespace vitkd::cuda {
namespace {

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

// The same with no more blocks than run at once, each a warp, for rows of whole vectors. While a warp works on a row
// its next one comes to shared memory, every thread's part to where only that thread reads it. The same arithmetic, so
// that the results are the same bits.
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
// on their way, so that 4096 rows are not three turns of its 132, as with two warps a row and 14 rows, but two. js
// would not fit the registers of one warp, and float32 would sum 32 terms in a row where 16 are as precise as the
// formula.
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
