// Distillation losses of rows of logits and their gradients. A team of threads, a warp or a block, holds the row in
// registers; only a row wider than the team (float32 math, 4096 classes for a block) is read again for each sweep.
#include "../kernels.h"
#include "device.cuh"

namespace vitkd::cuda {
namespace {

constexpr float kLog2 = 0.6931471805599453f;

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

constexpr size_t shared_bytes(int team) { return team > kWarp ? team / kWarp * sizeof(float) : 0; }

// The same result in every thread of the team.
template <int kTeam, class Combine>
__device__ float reduce(float value, Combine combine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  if constexpr (kTeam > kWarp) {
    float* const of_warp = shared_memory<float>();
    __syncthreads();
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
    for (int warp = 1; warp < kTeam / kWarp; ++warp) value = combine(value, of_warp[warp]);
  }
  return value;
}

// log softmax of a row: (x - largest) - log_sum, gathered while the row goes by.
struct LogSoftmax {
  float largest = -kInfinity;
  float sum = 0;
  float log_sum = 0;

  template <int kHeld>
  __device__ void update(const float (&x)[kHeld]) {  // beyond the row x is -inf
    float peak = largest;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) peak = fmaxf(peak, x[i]);
    const float shift = fmaxf(peak, kLowest);  // so that exp(-inf - shift) is 0, not NaN
    float part = 0;  // 4097 and more terms one after the other would cost digits
#pragma unroll
    for (int i = 0; i < kHeld; ++i) part += expf(x[i] - shift);
    sum = sum * expf(largest - shift) + part;
    largest = peak;
  }

  template <int kTeam>
  __device__ void finish() {
    const float mine = largest;
    largest = reduce<kTeam>(mine, Max{});
    log_sum = logf(reduce<kTeam>(sum * expf(mine - fmaxf(largest, kLowest)), Sum{}));
  }

  __device__ float operator()(float x) const { return x - largest - log_sum; }
};

// With q, p the softmax of student and teacher: a class's log p - log m and log q - log m, where m is what the kind
// compares with. The loss is the sum of p and q times these; a side that is its own m has none.
struct Ratios {
  float p, q;
};
__device__ Ratios ratios(KDKind kind, float log_p, float log_q) {
  if (kind == KDKind::kl) return {log_p - log_q, 0};
  if (kind == KDKind::reverse_kl) return {0, log_q - log_p};
  const float high = log_p > log_q ? log_p : log_q, low = log_p > log_q ? log_q : log_p;  // fmaxf would drop NaN
  const float log_m = high + log1pf(expf(low - high)) - kLog2;
  return {log_p - log_m, log_q - log_m};
}

// A member's classes of a row come in runs of 16 bytes, one run per stretch of kTeam runs.
template <class T, int kTeam, int kHeld>
struct Slice {
  int member;
  int64_t start, classes;

  __device__ int64_t run(int i) const { return start + (int64_t{i} * kTeam + member) * kVector<T>; }
  __device__ bool inside(int i) const { return run(i / kVector<T>) + i % kVector<T> < classes; }

  __device__ void load(float (&x)[kHeld], const T* row, bool vectors, float scale, float beyond) const {
#pragma unroll
    for (int i = 0; i < kHeld / kVector<T>; ++i) {
      Vector<T> values = {};
      if (vectors && run(i) < classes) values = *reinterpret_cast<const Vector<T>*>(row + run(i));
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        if (!vectors && run(i) + j < classes) values.values[j] = row[run(i) + j];
        x[i * kVector<T> + j] = run(i) + j < classes ? to_float(values.values[j]) * scale : beyond;
      }
    }
  }

  __device__ void store(T* row, const float (&x)[kHeld], bool vectors) const {
#pragma unroll
    for (int i = 0; i < kHeld / kVector<T>; ++i) {
      Vector<T> values;
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        from_float(values.values[j], x[i * kVector<T> + j]);
        if (!vectors && run(i) + j < classes) row[run(i) + j] = values.values[j];
      }
      if (vectors && run(i) < classes) *reinterpret_cast<Vector<T>*>(row + run(i)) = values;
    }
  }
};

// kTeam threads per row, kHeld classes in each thread's registers.
template <class T, int kTeam, int kHeld>
__global__ void __launch_bounds__(kTeam == kWarp ? 128 : kTeam) kd_loss_kernel(const KDLoss p, const bool vectors) {
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / kTeam) + threadIdx.x / kTeam;
  if (row >= p.rows) return;  // a whole team
  const int member = threadIdx.x % kTeam;
  const T* const student = static_cast<const T*>(p.student) + row * p.student_stride;
  const T* const teacher = static_cast<const T*>(p.teacher) + row * p.teacher_stride;
  const bool soft = p.kind != KDKind::l1 && p.kind != KDKind::mse;
  const float scale = soft ? static_cast<float>(1 / p.temperature) : 1.0f;
  const float temperature = static_cast<float>(p.temperature), beyond = soft ? -kInfinity : 0.0f;
  const bool held = p.classes <= kTeam * kHeld;
  float s[kHeld], t[kHeld];
  auto sweep = [&](bool first, auto body) {
    for (int64_t start = 0; start < p.classes; start += kTeam * kHeld) {
      const Slice<T, kTeam, kHeld> slice{member, start, p.classes};
      if (first || !held) {
        slice.load(s, student, vectors, scale, beyond);
        slice.load(t, teacher, vectors, scale, beyond);
      }
      body(slice);
    }
  };

  LogSoftmax log_q, log_p;
  float loss = 0, mean_p = 0, mean_q = 0;  // mean_p, mean_q: sums of p and q times their ratios
  if (soft) {
    sweep(true, [&](const auto&) {
      log_q.update(s);
      log_p.update(t);
    });
    log_q.template finish<kTeam>();
    log_p.template finish<kTeam>();
  }
  sweep(!soft, [&](const auto& slice) {
    float part = 0, part_p = 0, part_q = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (!slice.inside(i)) continue;
      if (soft) {
        const float p_log = log_p(t[i]), q_log = log_q(s[i]);
        const Ratios ratio = ratios(p.kind, p_log, q_log);
        part_p += expf(p_log) * ratio.p;
        part_q += expf(q_log) * ratio.q;
      } else {
        const float difference = s[i] - t[i];
        part += p.kind == KDKind::l1 ? fabsf(difference) : difference * difference;
      }
    }
    loss += part, mean_p += part_p, mean_q += part_q;
  });
  const float share = p.kind == KDKind::js ? 0.5f : 1.0f, per_class = 1 / static_cast<float>(p.classes);
  if (soft) {
    mean_p = reduce<kTeam>(mean_p, Sum{});
    mean_q = reduce<kTeam>(mean_q, Sum{});
    loss = share * (mean_p + mean_q) * temperature * temperature;
  } else {
    loss = reduce<kTeam>(loss, Sum{}) * per_class;
  }
  if (member == 0) static_cast<float*>(p.loss)[row] = loss;
  if (!p.student_grad && !p.teacher_grad) return;

  const float weight = static_cast<float>(p.weight), factor = temperature * weight;
  sweep(false, [&](const auto& slice) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (soft) {
        const float p_log = log_p(t[i]), q_log = log_q(s[i]), pi = expf(p_log), qi = expf(q_log);
        const Ratios ratio = ratios(p.kind, p_log, q_log);
        s[i] = factor * (p.kind == KDKind::kl ? qi - pi : share * qi * (ratio.q - mean_q));
        t[i] = factor * (p.kind == KDKind::reverse_kl ? pi - qi : share * pi * (ratio.p - mean_p));
      } else {
        const float difference = s[i] - t[i];
        const float sign = static_cast<float>((difference > 0) - (difference < 0));
        s[i] = (p.kind == KDKind::l1 ? sign : 2 * difference) * per_class * weight;
        t[i] = -s[i];
      }
    }
    const int64_t offset = row * p.classes;
    if (p.student_grad) slice.store(static_cast<T*>(p.student_grad) + offset, s, vectors);
    if (p.teacher_grad) slice.store(static_cast<T*>(p.teacher_grad) + offset, t, vectors);
  });
}

template <class T>
bool fits_vectors(const KDLoss& p) {
  for (const void* pointer : {p.student, p.teacher, static_cast<const void*>(p.student_grad),
                              static_cast<const void*>(p.teacher_grad)})
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
  return p.student_stride % kVector<T> == 0 && p.teacher_stride % kVector<T> == 0 && p.classes % kVector<T> == 0;
}

template <class T>
const char* queue(const KDLoss& p, void* stream) {
  const bool vectors = fits_vectors<T>(p);
  const int64_t blocks_of_warps = (p.rows + 3) / 4;
  if (p.classes <= kWarp * 8) return launch(kd_loss_kernel<T, kWarp, 8>, blocks_of_warps, 128, 0, stream, p, vectors);
  if (p.classes <= kWarp * 32) return launch(kd_loss_kernel<T, kWarp, 32>, blocks_of_warps, 128, 0, stream, p, vectors);
  constexpr int kTeam = 256;
  return launch(kd_loss_kernel<T, kTeam, 16>, p.rows, kTeam, shared_bytes(kTeam), stream, p, vectors);
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
