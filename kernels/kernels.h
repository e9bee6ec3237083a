// What a kernel is to the rest of the program: raw pointers, sizes, strides in elements. Nothing here knows torch.
#pragma once

#include <cstdint>

namespace vitkd {

enum class DType : int32_t { float32, bfloat16, float16, float64 };

// out = softmax(scale * q k^T) v for every batch entry and head. On the CPU a float32 qkv may go with a bfloat16 out
// and gradient of it, for which it is rounded, if at all, where it is read.
struct Attention {
  DType dtype;      // of qkv
  DType out_dtype;  // of out
  int64_t batch, tokens, heads, head_dim;
  double scale;
  const void* qkv;        // (batch, tokens, 3, heads, head_dim), head_dim contiguous
  int64_t qkv_stride[4];  // of batch, tokens, 3, heads
  void* out;              // (batch, tokens, heads, head_dim), contiguous
};

struct AttentionBackward {
  DType dtype;      // of qkv and grad_qkv
  DType out_dtype;  // of grad_out
  int64_t batch, tokens, heads, head_dim;
  double scale;
  const void* qkv;             // as above
  int64_t qkv_stride[4];
  const void* grad_out;        // (batch, tokens, heads, head_dim), head_dim contiguous
  int64_t grad_out_stride[3];  // of batch, tokens, heads
  void* grad_qkv;              // (batch, tokens, 3, heads, head_dim), contiguous
};

enum class KDKind : int32_t { kl, reverse_kl, js, l1, mse };

constexpr int64_t kMeanRows = 65536;  // of more, many blocks take the mean faster than one

// One loss per row of logits and, in the same sweep, its gradients.
// kl: T^2 KL(teacher || student), reverse_kl: T^2 KL(student || teacher),
// js: T^2 (KL(teacher || m) + KL(student || m)) / 2 with m the mean of both, all on softmax(logits / T);
// l1, mse: mean over the classes of |s - t| and (s - t)^2.
struct KDLoss {
  DType dtype;
  KDKind kind;
  int64_t rows, classes;
  double temperature;
  double weight;           // of the gradients, not of the loss
  const void* student;     // (rows, classes), classes contiguous
  int64_t student_stride;  // of rows
  const void* teacher;
  int64_t teacher_stride;
  void* loss;          // (rows,), float; double when dtype is float64
  void* student_grad;  // weight * d loss[row] / d student, (rows, classes) contiguous in dtype, or null when not wanted
  void* teacher_grad;
  void* mean;  // of the losses, one float, or null; on a GPU alone, of at most kMeanRows
};

// out = x Φ(x), or grad times its derivative at x; on the CPU alone.
struct Gelu {
  DType dtype;  // not float64
  int64_t count;
  const void* x;     // these three contiguous
  const void* grad;  // null for the value
  void* out;
};

enum class AttentionKDKind : int32_t { kl, mse };

// Whose attention is compared: the queries and keys of some heads.
struct AttentionSide {
  DType dtype;  // double only where the other side's is
  int64_t heads, head_dim;
  double scale;
  const void* qk;     // (batch, tokens, 2 or more, heads, head_dim), head_dim contiguous
  int64_t stride[4];  // of batch, tokens, queries and keys, heads
  void* grad;         // of an image's loss, (batch, tokens, 2, heads, head_dim) contiguous, float or double; or null
};

// KL(p || q) or the squared distance between rows of softmax(scale * q k^T), the teacher's p and the student's q, or
// between their means over heads; of an image it is the mean over queries and heads. On the CPU alone.
struct AttentionKD {
  AttentionKDKind kind;
  bool average_heads;  // else both have as many
  int64_t batch, tokens;
  AttentionSide student, teacher;
  void* loss;  // (batch, 1 or heads), the means over queries, float or double
};

// The mean over some tokens, the queries, of their softmax over some, the keys, alone; or, where grad_shares is given,
// its gradient. On the CPU alone.
struct AttentionShares {
  DType dtype;
  int64_t batch, tokens, slots, heads, head_dim;
  double scale;
  const void* qk;     // (batch, tokens, slots: 2 or more, heads, head_dim), head_dim contiguous
  int64_t stride[4];  // of batch, tokens, slots, heads
  int64_t query_count, key_count;
  const int64_t* queries;  // numbers of tokens, as keys are
  const int64_t* keys;
  void* shares;             // (batch, heads, key_count), float or double, contiguous as all below
  const void* grad_shares;  // the same
  void* grad_qk;            // (batch, tokens, slots, heads, head_dim), in dtype
};

// The density of each image's similarities, cosines, by normal kernels of that bandwidth, at points one bandwidth apart
// around 0; or, where grad_density is given, their gradient. On the CPU alone.
struct SimilarityDensity {
  DType dtype;  // float32 or float64
  int64_t images, count, points;
  double bandwidth;
  const void* similarities;  // (images, count), contiguous as all of these
  void* density;             // (images, points)
  const void* grad_density;
  void* grad_similarities;
};

// data *= factor * share, of both; a factor * share of 1 touches neither.
struct Scale {
  DType dtype;
  void* data[2];  // contiguous, on 16 bytes
  int64_t count[2];
  const float* factor;
  double share;
};

namespace cpu {

// Calls body(begin, end, context) on pieces of [0, count), on the caller's threads.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

void attention(const Attention&, ParallelFor);
void attention_backward(const AttentionBackward&, ParallelFor);
void kd_loss(const KDLoss&, ParallelFor);
void gelu(const Gelu&, ParallelFor);
void attention_kd(const AttentionKD&, ParallelFor);
void attention_shares(const AttentionShares&, ParallelFor);
void similarity_density(const SimilarityDensity&, ParallelFor);

}  // namespace cpu

namespace cuda {

// Each queues its work on a cudaStream_t and returns null, or says what went wrong.
const char* attention(const Attention&, void* stream);
const char* attention_backward(const AttentionBackward&, void* stream);
const char* kd_loss(const KDLoss&, void* stream);
const char* scale(const Scale&, void* stream);

}  // namespace cuda

}  // namespace vitkd
