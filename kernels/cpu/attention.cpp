// Attention on the CPU: one task owns a head, with its whole K and V packed once into the core's cache. A strip of
// query rows meets all keys at once, so the softmax takes one pass and only a strip of scores ever exists.
#include "../kernels.h"
#include "gemm.h"
#include "workspace.h"

namespace vitkd::cpu::VITKD_ISA {

namespace {

// Rows of one strip: a multiple of the tile's rows; at 208 keys a strip of scores takes 40 KB.
constexpr int64_t kStrip = 48;
constexpr double kLog2E = 1.4426950408889634;

int64_t strip_rows(int64_t first, int64_t tokens) { return tokens - first < kStrip ? tokens - first : kStrip; }

// rows of a strided (tokens, head_dim) into rows of `width`, widened and scaled, the padding zero
template <class S, class T = Compute<S>>
void pack_rows(const S* in, int64_t stride, int64_t tokens, int64_t head_dim, T scale, T* out, int64_t width) {
  for (int64_t n = 0; n < tokens; ++n) unpack(in + n * stride, head_dim, scale, out + n * width, width, T(0));
}

// (tokens, width) into (head_dim, keys): what the scores' product streams; keys past the last token are zero
template <class T>
void transpose(const T* in, int64_t tokens, int64_t head_dim, int64_t width, T* out, int64_t keys) {
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int64_t n = 0; n < tokens; ++n) out[d * keys + n] = in[n * width + d];
    for (int64_t n = tokens; n < keys; ++n) out[d * keys + n] = 0;
  }
}

// One row of scores (in units of log 2) into exp2(score - max), zero past the last token; returns the row's sum.
template <class T>
T exponentials(T* row, int64_t tokens, int64_t keys) {
  for (int64_t n = tokens; n < keys; ++n) row[n] = -__builtin_inf();
  Vec<T> most = load(row);
  for (int64_t n = kLanes<T>; n < keys; n += kLanes<T>) most = maximum<T>(load(row + n), most);
  const Vec<T> peak = broadcast(max<T>(most));
  Vec<T> total = {};
  for (int64_t n = 0; n < keys; n += kLanes<T>) {
    const Vec<T> e = exp2(load(row + n) - peak);
    store(row + n, e);
    total += e;
  }
  return sum<T>(total);
}

template <class T>
void scale_row(T* row, int64_t keys, T factor) {
  for (int64_t n = 0; n < keys; n += kLanes<T>) store(row + n, load(row + n) * factor);
}

// Turns weights P and their gradient dP, in place, into dS = P (dP - sum(P dP)).
template <class T>
void softmax_backward(const T* weights, T* grad, int64_t keys) {
  Vec<T> dot = {};
  for (int64_t n = 0; n < keys; n += kLanes<T>) dot += load(weights + n) * load(grad + n);
  const T delta = sum<T>(dot);
  for (int64_t n = 0; n < keys; n += kLanes<T>) store(grad + n, load(weights + n) * (load(grad + n) - delta));
}

template <class S>
void forward_head(const Attention& args, int64_t index, Workspace& memory) {
  using T = Compute<S>;
  const int64_t tokens = args.tokens, head_dim = args.head_dim;
  const int64_t b = index / args.heads, h = index % args.heads, row_stride = args.qkv_stride[1];
  const int64_t keys = pad<T>(tokens), width = pad<T>(head_dim);
  const S* query = static_cast<const S*>(args.qkv) + b * args.qkv_stride[0] + h * args.qkv_stride[3];
  const S* key = query + args.qkv_stride[2];
  const S* value = key + args.qkv_stride[2];
  S* out = static_cast<S*>(args.out) + (b * tokens * args.heads + h) * head_dim;

  memory.rewind();
  T* rows = memory.take<T>(tokens * width);
  T* key_t = memory.take<T>(head_dim * keys);
  T* scores = memory.take<T>(kStrip * keys);
  T* strip = memory.take<T>(kStrip * width);
  pack_rows(key, row_stride, tokens, head_dim, T(1), rows, width);
  transpose(rows, tokens, head_dim, width, key_t, keys);
  pack_rows(value, row_stride, tokens, head_dim, T(1), rows, width);

  for (int64_t first = 0; first < tokens; first += kStrip) {
    const int64_t n = strip_rows(first, tokens);
    pack_rows(query + first * row_stride, row_stride, n, head_dim, T(args.scale * kLog2E), strip, width);
    gemm<T>({n, keys, head_dim, strip, width, 1, key_t, keys, scores, keys, false});
    T sums[kStrip];
    for (int64_t i = 0; i < n; ++i) sums[i] = exponentials(scores + i * keys, tokens, keys);
    gemm<T>({n, width, tokens, scores, keys, 1, rows, width, strip, width, false});
    for (int64_t i = 0; i < n; ++i) {
      pack(strip + i * width, head_dim, T(1) / sums[i], out + (first + i) * args.heads * head_dim);
    }
  }
}

template <class S>
void backward_head(const AttentionBackward& args, int64_t index, Workspace& memory) {
  using T = Compute<S>;
  const int64_t tokens = args.tokens, head_dim = args.head_dim;
  const int64_t b = index / args.heads, h = index % args.heads, row_stride = args.qkv_stride[1];
  const int64_t keys = pad<T>(tokens), width = pad<T>(head_dim), size = tokens * width;
  const S* query = static_cast<const S*>(args.qkv) + b * args.qkv_stride[0] + h * args.qkv_stride[3];
  const S* key = query + args.qkv_stride[2];
  const S* value = key + args.qkv_stride[2];
  const S* grad = static_cast<const S*>(args.grad_out) + b * args.grad_out_stride[0] + h * args.grad_out_stride[2];
  const int64_t grad_stride = args.grad_out_stride[1];
  const int64_t channels = args.heads * head_dim, out_stride = 3 * channels;
  S* grad_qkv = static_cast<S*>(args.grad_qkv) + b * tokens * out_stride + h * head_dim;

  memory.rewind();
  T* keys_packed = memory.take<T>(size);
  T* key_t = memory.take<T>(head_dim * keys);
  T* value_t = memory.take<T>(head_dim * keys);
  T* grad_key = memory.take<T>(size);
  T* grad_value = memory.take<T>(size);
  T* weights = memory.take<T>(kStrip * keys);
  T* grad_scores = memory.take<T>(kStrip * keys);
  T* query_strip = memory.take<T>(kStrip * width);
  T* grad_strip = memory.take<T>(kStrip * width);
  T* grad_query = memory.take<T>(kStrip * width);
  pack_rows(value, row_stride, tokens, head_dim, T(1), keys_packed, width);
  transpose(keys_packed, tokens, head_dim, width, value_t, keys);
  pack_rows(key, row_stride, tokens, head_dim, T(1), keys_packed, width);
  transpose(keys_packed, tokens, head_dim, width, key_t, keys);

  // Scaling q once puts scale * log 2(e) into the scores, and the same factor, taken out again, into dK.
  const T score_scale = T(args.scale * kLog2E);
  for (int64_t first = 0; first < tokens; first += kStrip) {
    const int64_t n = strip_rows(first, tokens);
    const bool later = first > 0;
    pack_rows(query + first * row_stride, row_stride, n, head_dim, score_scale, query_strip, width);
    pack_rows(grad + first * grad_stride, grad_stride, n, head_dim, T(1), grad_strip, width);
    gemm<T>({n, keys, head_dim, query_strip, width, 1, key_t, keys, weights, keys, false});
    gemm<T>({n, keys, head_dim, grad_strip, width, 1, value_t, keys, grad_scores, keys, false});
    for (int64_t i = 0; i < n; ++i) {
      T* row = weights + i * keys;
      const T total = exponentials(row, tokens, keys);
      scale_row(row, keys, T(1) / total);
      softmax_backward(row, grad_scores + i * keys, keys);
    }
    gemm<T>({n, width, tokens, grad_scores, keys, 1, keys_packed, width, grad_query, width, false});
    gemm<T>({tokens, width, n, weights, 1, keys, grad_strip, width, grad_value, width, later});
    gemm<T>({tokens, width, n, grad_scores, 1, keys, query_strip, width, grad_key, width, later});
    for (int64_t i = 0; i < n; ++i) {
      pack(grad_query + i * width, head_dim, T(args.scale), grad_qkv + (first + i) * out_stride);
    }
  }
  for (int64_t n = 0; n < tokens; ++n) {
    pack(grad_key + n * width, head_dim, T(1 / kLog2E), grad_qkv + n * out_stride + channels);
    pack(grad_value + n * width, head_dim, T(1), grad_qkv + n * out_stride + 2 * channels);
  }
}

// Heads of short sequences are small: hand out enough of them at a time to be worth a thread.
template <class Args>
int64_t heads_per_task(const Args& args) {
  const int64_t work = args.tokens * args.tokens * args.head_dim;
  return work >= 65536 ? 1 : 65536 / (work + 1) + 1;
}

template <class Args, void (*head)(const Args&, int64_t, Workspace&)>
void for_each_head(const Args& args, ParallelFor parallel_for) {
  auto body = [](int64_t begin, int64_t end, void* context) {
    Workspace memory;
    for (int64_t i = begin; i < end; ++i) head(*static_cast<const Args*>(context), i, memory);
  };
  parallel_for(args.batch * args.heads, heads_per_task(args), body, const_cast<Args*>(&args));
}

}  // namespace

void attention(const Attention& args, ParallelFor parallel_for) {
  switch (args.dtype) {
    case DType::float32: return for_each_head<Attention, forward_head<float>>(args, parallel_for);
    case DType::bfloat16: return for_each_head<Attention, forward_head<bf16>>(args, parallel_for);
    case DType::float16: return for_each_head<Attention, forward_head<f16>>(args, parallel_for);
    case DType::float64: return for_each_head<Attention, forward_head<double>>(args, parallel_for);
  }
}

void attention_backward(const AttentionBackward& args, ParallelFor parallel_for) {
  switch (args.dtype) {
    case DType::float32: return for_each_head<AttentionBackward, backward_head<float>>(args, parallel_for);
    case DType::bfloat16: return for_each_head<AttentionBackward, backward_head<bf16>>(args, parallel_for);
    case DType::float16: return for_each_head<AttentionBackward, backward_head<f16>>(args, parallel_for);
    case DType::float64: return for_each_head<AttentionBackward, backward_head<double>>(args, parallel_for);
  }
}

}  // namespace vitkd::cpu::VITKD_ISA
