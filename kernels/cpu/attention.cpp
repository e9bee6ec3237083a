// Attention on the CPU: one task owns a head, with its whole K and V packed once into the core's cache. All keys meet a
// strip of queries at once, as a matrix of scores with one column per query: the softmax then runs down the columns, as
// many queries abreast as a vector has lanes, and only a strip of scores ever exists.
#include "../kernels.h"
#include "shares.h"
#include "softmax.h"
#include "workspace.h"

namespace vitkd::cpu::VITKD_ISA {

namespace {

constexpr int64_t kFewHeads = 16;
constexpr int64_t kStripLanes = 64;  // queries of one strip: at 197 keys their scores take 50 KB
constexpr int64_t kWholeLanes = 80;  // a head of no more is one strip: two would take a second pass over dK and dV

constexpr int64_t strip_lanes(int64_t tokens) { return tokens <= kWholeLanes ? kWholeLanes : kStripLanes; }

// Queries `first` and on: `columns` of them are whole vectors, or fill them up, what is left of `rows` are lone ones.
struct Strip {
  int64_t first, rows, columns;
  int64_t stride;  // of its matrices, in which lone queries have columns, too
};

// Strips as even as whole vectors allow: 197 queries are 13 vectors of 16, in strips of 4, 3, 3 and 3; or, on tiles, in
// which 32 queries are summed over at a time, of 4, 4, 4 and 1.
template <class In, class Body>
void for_each_strip(int64_t tokens, Body body) {
  constexpr int64_t lanes = kLanes<SumOf<In>>, tile = kTileOf<In> * kSteps<In>;
  constexpr int64_t together = tile > lanes ? tile / lanes : 1;
  const int64_t most = strip_lanes(tokens) / lanes, lone = lone_queries<In>(tokens);
  int64_t units = pad<SumOf<In>>(tokens - lone) / lanes;
  for (int64_t first = 0; units > 0;) {
    const int64_t strips = (units + most - 1) / most, even = round_up((units + strips - 1) / strips, together);
    const int64_t width = even < units ? even : units, columns = width * lanes;
    units -= width;
    if (units > 0) body(Strip{first, columns, columns, columns});
    else body(Strip{first, tokens - first, columns, columns + (lone > 0 ? lanes : 0)});
    first += columns;
  }
}

template <class In>
int64_t strips_of(int64_t tokens) {
  int64_t strips = 0;
  for_each_strip<In>(tokens, [&](const Strip&) { ++strips; });
  return strips;
}

template <class In>
int64_t widest_strip(int64_t tokens) {
  using T = SumOf<In>;
  const int64_t padded = pad<T>(tokens), most = strip_lanes(tokens) + (lone_queries<In>(tokens) > 0 ? kLanes<T> : 0);
  return padded < most ? padded : most;
}

// Where the q, k and v of a head begin.
template <class S, class Args>
const S* head_of(const Args& args, int64_t index) {
  const int64_t b = index / args.heads, h = index % args.heads;
  return static_cast<const S*>(args.qkv) + b * args.qkv_stride[0] + h * args.qkv_stride[3];
}

template <class O>
const O* grad_of(const AttentionBackward& args, int64_t index) {
  const int64_t b = index / args.heads, h = index % args.heads;
  return static_cast<const O*>(args.grad_out) + b * args.grad_out_stride[0] + h * args.grad_out_stride[2];
}

template <class S>
S* grad_qkv_of(const AttentionBackward& args, int64_t index) {
  const int64_t b = index / args.heads, h = index % args.heads, channels = args.heads * args.head_dim;
  return static_cast<S*>(args.grad_qkv) + b * args.tokens * 3 * channels + h * args.head_dim;
}

// What a thread computes now, next and after that, as far as it can tell; the number of them all stands for nothing.
struct Turn {
  int64_t now, next, after;
};

// What the head after the next reads and then, of backward, what the next writes: in the time that one small head takes
// memory has not answered.
template <class S, class O, class Args>
void look_ahead(Ahead& ahead, const Args& args, const Turn& heads) {
  constexpr bool backward = std::is_same_v<Args, AttentionBackward>;
  const int64_t all = args.batch * args.heads, tokens = args.tokens, head_dim = args.head_dim;
  if (heads.after < all) {
    const S* rows = head_of<S>(args, heads.after);
    for (int64_t i = 0; i < 3; ++i) ahead.add(rows + i * args.qkv_stride[2], args.qkv_stride[1], tokens, head_dim);
    if constexpr (backward) ahead.add(grad_of<O>(args, heads.after), args.grad_out_stride[1], tokens, head_dim);
  }
  if constexpr (backward) {
    if (heads.next == all) return;
    const S* rows = grad_qkv_of<S>(args, heads.next);
    const int64_t channels = args.heads * head_dim;
    for (int64_t i = 0; i < 3; ++i) ahead.add(rows + i * channels, 3 * channels, tokens, head_dim);
  }
}

// Queries of one head may be shared among tasks where there are few heads; each packs the keys for itself.
inline int64_t parts_of_head(const Attention& args) {
  const int64_t heads = args.batch * args.heads, strips = (args.tokens + kStripLanes - 1) / kStripLanes;
  const int64_t wanted = (kFewHeads + heads - 1) / heads, most = strips / 2 > 0 ? strips / 2 : 1;
  return wanted < most ? wanted : most;
}

template <class S, class In, class O>
void forward_head(const Attention& args, const Turn& tasks, Workspace& memory) {
  using T = SumOf<In>;
  const int64_t parts = parts_of_head(args), index = tasks.now / parts, part = tasks.now % parts;
  const int64_t tokens = args.tokens, head_dim = args.head_dim;
  const int64_t b = index / args.heads, h = index % args.heads, row_stride = args.qkv_stride[1];
  const int64_t width = pad<T>(head_dim), depth = steps<In>(head_dim), key_width = pad<T>(depth);
  const int64_t strip = widest_strip<In>(tokens);
  const S* query = head_of<S>(args, index);
  const S* key = query + args.qkv_stride[2];
  const S* value = key + args.qkv_stride[2];
  const int64_t out_stride = args.heads * head_dim;
  O* out = static_cast<O*>(args.out) + b * tokens * out_stride + h * head_dim;

  Ahead ahead;
  if (tasks.after / parts != index) look_ahead<S, O>(ahead, args, {index, tasks.next / parts, tasks.after / parts});
  ahead.spread_over(2 * tokens * tokens * head_dim / parts);
  memory.rewind();
  In* key_room = memory.take<In>(tile_rows<In>(tokens) * key_width);
  In* value_room = memory.take<In>(tile_depth<In>(tokens) * width);
  const auto key_rows = by_elements(key, row_stride, tokens, head_dim, key_room);
  const auto value_down = by_vectors(value, row_stride, tokens, head_dim, value_room);
  In* query_across = memory.take<In>(tile_depth<In>(head_dim) * strip);
  T* scores = memory.take<T>(tile_rows<In>(tokens) * strip);
  T* out_strip = memory.take<T>(strip * width);
  In* weights = kSteps<In> == 1 ? reinterpret_cast<In*>(scores) : memory.take<In>(tile_depth<In>(tokens) * strip);
  const Lone<In> lone{tokens, head_dim, memory.take<In>(key_width), &ahead};
  T* lone_scores = memory.take<T>(pad<T>(tokens));

  const T scale = T(args.scale * kLog2E), factor = exponent_factor<In>(scale);
  for_each_strip<In>(tokens, [&](const Strip& its) {
    if (its.first / kStripLanes % parts != part) return;
    const S* queries = query + its.first * row_stride;
    const int64_t columns = kScoresInColumn<In> ? its.stride : its.columns;
    pack_across(queries, row_stride, its.rows, head_dim, scale, query_across, columns);
    gemm<In>({tokens, columns, depth, key_rows.rows, key_rows.stride, 1, query_across, columns, scores, its.stride,
              false, &ahead});
    T inverse[kWholeLanes];
    for (int64_t n = 0; n < its.columns; n += kLanes<T>) {
      store(inverse + n, T(1) / exponentials(scores + n, tokens, its.stride, factor, weights + n));
    }
    for (int64_t n = its.columns; n < its.rows; ++n) {
      lone.meet(queries + n * row_stride, scale, key_rows, scores + n, its.stride, lone_scores);
      inverse[n] = T(1) / exponentials_of_row<In>(lone_scores, tokens, factor);
      row_to_column(operand_row<In>(lone_scores, tokens), steps<In>(tokens), weights + n, its.stride);
    }
    clear(weights, steps<In>(tokens), tile_depth<In>(tokens), its.stride);
    const Result<O, In> result(out + its.first * out_stride, out_stride, head_dim, out_strip, its.rows,
                               sections_of<In>(steps<In>(tokens)), {inverse});
    gemm<In>({its.rows, width, steps<In>(tokens), weights, 1, its.stride, value_down.rows, value_down.stride,
              result.rows, result.stride, false, &ahead, result.in_product()});
    result.finish(its.rows);
  });
}

template <class S, class In, class O>
void backward_head(const AttentionBackward& args, const Turn& heads, Workspace& memory) {
  using T = SumOf<In>;
  constexpr bool pairs = kSteps<In> == 2;
  const int64_t tokens = args.tokens, head_dim = args.head_dim;
  const int64_t row_stride = args.qkv_stride[1];
  const int64_t width = pad<T>(head_dim), depth = steps<In>(head_dim), key_width = pad<T>(depth);
  const int64_t strip = widest_strip<In>(tokens), padded_tokens = tile_rows<In>(tokens);
  const S* query = head_of<S>(args, heads.now);
  const S* key = query + args.qkv_stride[2];
  const S* value = key + args.qkv_stride[2];
  const O* grad = grad_of<O>(args, heads.now);
  const int64_t grad_stride = args.grad_out_stride[1];
  const int64_t channels = args.heads * head_dim, out_stride = 3 * channels;
  S* grad_qkv = grad_qkv_of<S>(args, heads.now);

  Ahead ahead;
  look_ahead<S, O>(ahead, args, heads);
  ahead.spread_over(5 * tokens * tokens * head_dim);
  memory.rewind();
  In* value_room = memory.take<In>(padded_tokens * key_width);
  In* key_room = memory.take<In>(tile_depth<In>(tokens) * width);
  const auto value_rows = by_elements(value, row_stride, tokens, head_dim, value_room);
  const auto key_down = by_vectors(key, row_stride, tokens, head_dim, key_room);
  auto key_rows = key_down;
  if (pairs) key_rows = by_elements(key, row_stride, tokens, head_dim, memory.take<In>(padded_tokens * key_width));
  In* query_across = memory.take<In>(tile_depth<In>(head_dim) * strip);
  In* grad_across = memory.take<In>(tile_depth<In>(head_dim) * strip);
  In* query_room = memory.take<In>(tile_depth<In>(strip) * width);
  In* grad_room = memory.take<In>(tile_depth<In>(strip) * width);
  T* scores = memory.take<T>(padded_tokens * strip);
  T* grads = memory.take<T>(padded_tokens * strip);
  T* query_strip = memory.take<T>(strip * width);
  T* grad_key_room = memory.take<T>(padded_tokens * width);
  T* grad_value_room = memory.take<T>(padded_tokens * width);
  // Floats take the scale into dS; pairs, which would round it, into dQ and dK.
  const T grad_scale = pairs ? T(1) : T(args.scale);
  const Finish<T> rest{nullptr, pairs ? T(args.scale) : T(1)};
  const int64_t times = strips_of<In>(tokens);
  const Result<S, In> grad_key(grad_qkv + channels, out_stride, head_dim, grad_key_room, tokens, times, rest);
  const Result<S, In> grad_value(grad_qkv + 2 * channels, out_stride, head_dim, grad_value_room, tokens, times, {});
  Softened<In> softened = {reinterpret_cast<In*>(scores), reinterpret_cast<In*>(grads), reinterpret_cast<In*>(grads)};
  if (pairs) {
    const int64_t row = tile_depth<In>(strip);
    softened = {memory.take<In>(padded_tokens * row), memory.take<In>(padded_tokens * row),
                memory.take<In>(tile_depth<In>(tokens) * strip)};
  }

  const Lone<In> lone{tokens, head_dim, memory.take<In>(key_width), &ahead};
  T* lone_scores = memory.take<T>(pad<T>(tokens));
  T* lone_grads = memory.take<T>(pad<T>(tokens));

  const T scale = T(args.scale * kLog2E), factor = exponent_factor<In>(scale);
  for_each_strip<In>(tokens, [&](const Strip& its) {
    const int64_t rows = its.rows, stride = its.stride, columns = kScoresInColumn<In> ? stride : its.columns;
    const S* queries = query + its.first * row_stride;
    const O* grads_out = grad + its.first * grad_stride;
    pack_across(queries, row_stride, rows, head_dim, scale, query_across, columns);
    pack_across(grads_out, grad_stride, rows, head_dim, T(1), grad_across, columns);
    const auto query_down = by_vectors(queries, row_stride, rows, head_dim, query_room);
    const auto grad_down = by_vectors(grads_out, grad_stride, rows, head_dim, grad_room);
    gemm<In>({tokens, columns, depth, key_rows.rows, key_rows.stride, 1, query_across, columns, scores, stride, false,
              &ahead});
    gemm<In>({tokens, columns, depth, value_rows.rows, value_rows.stride, 1, grad_across, columns, grads, stride, false,
              &ahead});
    for (int64_t n = 0; n < its.columns; n += kLanes<T>) {
      const int64_t m = n / kSteps<In>;
      softmax_backward<In>(scores + n, grads + n, tokens, stride, factor, grad_scale,
                           {softened.weights_rows + m, softened.grad_rows + m, softened.grad_down + n});
    }
    const int64_t a_row = tile_depth<In>(stride);
    if (pairs && steps<In>(its.columns) < a_row) {
      for (In* matrix : {softened.weights_rows, softened.grad_rows}) {
        clear_end(matrix, tokens, steps<In>(its.columns), a_row);
      }
    }
    for (int64_t n = its.columns; n < rows; ++n) {
      lone.meet(queries + n * row_stride, scale, key_rows, scores + n, stride, lone_scores);
      lone.meet(grads_out + n * grad_stride, T(1), value_rows, grads + n, stride, lone_grads);
      softmax_backward_of_row<In>(lone_scores, lone_grads, tokens, factor, grad_scale);
      to_columns(lone_scores, lone_grads, tokens, n, stride, softened);
    }
    if (pairs) clear(softened.grad_down, steps<In>(tokens), tile_depth<In>(tokens), stride);
    const bool later = its.first > 0;
    const Result<S, In> grad_query(grad_qkv + its.first * out_stride, out_stride, head_dim, query_strip, rows,
                                   sections_of<In>(steps<In>(tokens)), rest);
    gemm<In>({rows, width, steps<In>(tokens), softened.grad_down, 1, stride, key_down.rows, key_down.stride,
              grad_query.rows, grad_query.stride, false, &ahead, grad_query.in_product()});
    gemm<In>({tokens, width, steps<In>(rows), softened.weights_rows, a_row, 1, grad_down.rows, grad_down.stride,
              grad_value.rows, grad_value.stride, later, &ahead, grad_value.in_product()});
    gemm<In>({tokens, width, steps<In>(rows), softened.grad_rows, a_row, 1, query_down.rows, query_down.stride,
              grad_key.rows, grad_key.stride, later, &ahead, grad_key.in_product()});
    grad_query.finish(rows);
  });
  grad_key.finish(tokens);
  grad_value.finish(tokens);
}

// Heads of short sequences are small: hand out enough of them at a time to be worth a thread.
template <class Args>
int64_t heads_per_task(const Args& args) {
  const int64_t work = args.tokens * args.tokens * args.head_dim;
  return work >= 65536 ? 1 : 65536 / (work + 1) + 1;
}

template <class Args, void (*head)(const Args&, const Turn&, Workspace&)>
void for_each_head(const Args& args, int64_t parts, ParallelFor parallel_for) {
  Shares heads(args.batch * args.heads * parts, heads_per_task(args));
  heads.among(parallel_for, [&](Shares::Walk walk) {
    [[maybe_unused]] const Tiles tiles;
    Workspace memory;
    for (Range mine = walk.take(); !mine.empty(); mine = walk.take()) {
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const auto upcoming = [&](int64_t n) { return i + n < mine.end ? i + n : walk.upcoming(i + n - mine.end); };
        head(args, {i, upcoming(1), upcoming(2)}, memory);
      }
    }
  });
}

// S is what qkv is stored in, In what is multiplied, O what out and its gradient are stored in.
template <class S, class In, class O>
void run(const Attention& args, ParallelFor parallel_for) {
  for_each_head<Attention, forward_head<S, In, O>>(args, parts_of_head(args), parallel_for);
}

template <class S, class In, class O>
void run(const AttentionBackward& args, ParallelFor parallel_for) {
  for_each_head<AttentionBackward, backward_head<S, In, O>>(args, 1, parallel_for);
}

template <class Args>
void choose(const Args& args, ParallelFor parallel_for) {
#if defined(__AVX512BF16__)  // this instruction set is asked for bfloat16 alone
  if (args.dtype == DType::float32) return run<float, Pair, bf16>(args, parallel_for);
  run<bf16, Pair, bf16>(args, parallel_for);
#else
  switch (args.dtype) {
    case DType::float32:
      if (args.out_dtype == DType::bfloat16) return run<float, float, bf16>(args, parallel_for);
      return run<float, float, float>(args, parallel_for);
    case DType::bfloat16: return run<bf16, float, bf16>(args, parallel_for);
    case DType::float16: return run<f16, float, f16>(args, parallel_for);
    case DType::float64: return run<double, double, double>(args, parallel_for);
  }
#endif
}

}  // namespace

void attention(const Attention& args, ParallelFor parallel_for) { choose(args, parallel_for); }
void attention_backward(const AttentionBackward& args, ParallelFor parallel_for) { choose(args, parallel_for); }

}  // namespace vitkd::cpu::VITKD_ISA
