// Every CPU kernel on buffers of exactly the size it may touch, for a build with -fsanitize=address,undefined: a read
// or a write outside, a misaligned access or an overflow ends the program. Results are compared with a plain double
// loop, so that a kernel that touches nothing does not pass either.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../../kernels/cpu/isa.h"
#include "../../../kernels/kernels.h"

using namespace vitkd;

namespace {

// A thread for each piece of work, one after another: the first to come does everything, from its own share backwards.
void serial(int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; ++i) body((i + count / 2) % count, (i + count / 2) % count + 1, context);
}

float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return bits & 0x8000 ? -size : size;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

// A tensor in one of the four dtypes, on the heap, `offset` elements into an allocation of exactly that size more.
struct Buffer {
  DType dtype;
  int64_t size, offset;
  char* memory;

  Buffer(DType dtype, int64_t size, int64_t offset) : dtype(dtype), size(size), offset(offset) {
    memory = static_cast<char*>(std::malloc(static_cast<size_t>((size + offset) * width())));
    for (int64_t i = 0; i < size; ++i) set(i, std::nan(""));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(memory); }

  int64_t width() const { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
  char* at(int64_t i) const { return memory + (i + offset) * width(); }
  void* data() const { return at(0); }

  double get(int64_t i) const {
    double d;
    float f;
    uint16_t h;
    switch (dtype) {
      case DType::float64: __builtin_memcpy(&d, at(i), 8); return d;
      case DType::float32: __builtin_memcpy(&f, at(i), 4); return f;
      case DType::float16: __builtin_memcpy(&h, at(i), 2); return from_half(h);
      default:
        __builtin_memcpy(&h, at(i), 2);
        const uint32_t bits = uint32_t{h} << 16;
        __builtin_memcpy(&f, &bits, 4);
        return f;
    }
  }

  void set(int64_t i, double x) {  // 16-bit values come from `random`, which needs no rounding
    const float f = static_cast<float>(x);
    uint16_t h = static_cast<uint16_t>(bits_of(f) >> 16);
    if (dtype == DType::float16) {
      h = std::isnan(f)
              ? 0x7e00
              : static_cast<uint16_t>((bits_of(f) >> 16 & 0x8000) | ((bits_of(f) - 0x38000000u) >> 13 & 0x7fff));
    }
    if (dtype == DType::float64) __builtin_memcpy(at(i), &x, 8);
    else if (dtype == DType::float32) __builtin_memcpy(at(i), &f, 4);
    else __builtin_memcpy(at(i), &h, 2);
  }

  void fill() {
    for (int64_t i = 0; i < size; ++i) set(i, random());
  }

  static double random() {  // a multiple of 1/16 in [-4, 4] without 0: exact in every dtype
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    const int n = static_cast<int>(state >> 24) % 64 + 1;
    return (state & 1 << 20 ? n : -n) / 16.0;
  }
};

double tolerance(DType dtype) {
  const double all[] = {1e-5, 4e-2, 6e-3, 1e-12};
  return all[static_cast<int>(dtype)];
}

void expect(double got, double want, double size, DType dtype, const char* what) {
  if (std::abs(got - want) <= tolerance(dtype) * size) return;
  std::fprintf(stderr, "%s: got %g, want %g\n", what, got, want);
  std::exit(1);
}

void attention_case(DType dtype, DType out_dtype, int64_t tokens, int64_t head_dim, int64_t offset) {
  const int64_t batch = 2, heads = 2, channels = heads * head_dim, row = 3 * channels;
  Buffer qkv(dtype, batch * tokens * row, offset), grad_out(out_dtype, batch * tokens * channels, offset);
  Buffer out(out_dtype, grad_out.size, offset), grad_qkv(dtype, qkv.size, offset);
  qkv.fill();
  grad_out.fill();
  const double scale = 1.0 / static_cast<double>(head_dim);
  Attention forward{dtype, out_dtype, batch, tokens, heads, head_dim, scale,
                    qkv.data(), {tokens * row, row, channels, head_dim}, out.data()};
  AttentionBackward backward{dtype, out_dtype, batch, tokens, heads, head_dim, scale,
                             qkv.data(), {tokens * row, row, channels, head_dim},
                             grad_out.data(), {tokens * channels, channels, head_dim}, grad_qkv.data()};
  cpu::attention(forward, serial);
  cpu::attention_backward(backward, serial);

  std::vector<double> want(static_cast<size_t>(qkv.size), 0.0);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      auto at = [&](int64_t n, int64_t which, int64_t d) {
        return (b * tokens + n) * row + which * channels + h * head_dim + d;
      };
      auto at_out = [&](int64_t n, int64_t d) { return (b * tokens + n) * channels + h * head_dim + d; };
      for (int64_t i = 0; i < tokens; ++i) {
        std::vector<double> p(static_cast<size_t>(tokens)), dp(static_cast<size_t>(tokens), 0.0);
        double most = -INFINITY, sum = 0, delta = 0;
        for (int64_t j = 0; j < tokens; ++j) {
          double s = 0;
          for (int64_t d = 0; d < head_dim; ++d) s += qkv.get(at(i, 0, d)) * qkv.get(at(j, 1, d)) * scale;
          p[j] = s;
          most = s > most ? s : most;
        }
        for (double& x : p) sum += x = std::exp(x - most);
        for (double& x : p) x /= sum;
        for (int64_t d = 0; d < head_dim; ++d) {
          double o = 0;
          for (int64_t j = 0; j < tokens; ++j) {
            o += p[j] * qkv.get(at(j, 2, d));
            dp[j] += grad_out.get(at_out(i, d)) * qkv.get(at(j, 2, d));
            want[at(j, 2, d)] += p[j] * grad_out.get(at_out(i, d));
          }
          expect(out.get(at_out(i, d)), o, 4, out_dtype, "attention");
        }
        for (int64_t j = 0; j < tokens; ++j) delta += p[j] * dp[j];
        for (int64_t j = 0; j < tokens; ++j) {
          for (int64_t d = 0; d < head_dim; ++d) {
            const double ds = p[j] * (dp[j] - delta) * scale;
            want[at(i, 0, d)] += ds * qkv.get(at(j, 1, d));
            want[at(j, 1, d)] += ds * qkv.get(at(i, 0, d));
          }
        }
      }
    }
  }
  double size = 1;
  for (double x : want) size = std::abs(x) > size ? std::abs(x) : size;
  for (int64_t i = 0; i < qkv.size; ++i)
    expect(grad_qkv.get(i), want[static_cast<size_t>(i)], size, out_dtype, "attention_backward");
}

void kd_case(DType dtype, int64_t classes, int64_t offset) {
  const int64_t rows = 3, stride = classes + 1;
  Buffer student(dtype, (rows - 1) * stride + classes, offset), teacher(dtype, student.size, offset);
  Buffer grad_s(dtype, rows * classes, offset), grad_t(dtype, rows * classes, offset);
  Buffer loss(dtype == DType::float64 ? DType::float64 : DType::float32, rows, offset);
  student.fill();
  teacher.fill();
  for (int kind = 0; kind < 5; ++kind) {
    const double temperature = kind > 2 ? 1.0 : 2.0;
    KDLoss args{dtype, KDKind(kind), rows, classes, temperature, 1.0, student.data(), stride, teacher.data(), stride,
                loss.data(), grad_s.data(), grad_t.data()};
    cpu::kd_loss(args, serial);
    for (int64_t i = 0; i < rows; ++i) {
      auto log_softmax = [&](const Buffer& logits, int64_t c) {
        double sum = 0;
        for (int64_t k = 0; k < classes; ++k)
          sum += std::exp((logits.get(i * stride + k) - logits.get(i * stride + c)) / temperature);
        return -std::log(sum);
      };
      double want = 0;
      for (int64_t c = 0; c < classes; ++c) {
        const double s = log_softmax(student, c), t = log_softmax(teacher, c),
                     m = std::log((std::exp(s) + std::exp(t)) / 2);
        const double d = student.get(i * stride + c) - teacher.get(i * stride + c), n = static_cast<double>(classes);
        const double terms[] = {std::exp(t) * (t - s), std::exp(s) * (s - t),
                                (std::exp(t) * (t - m) + std::exp(s) * (s - m)) / 2, std::abs(d) / n, d * d / n};
        want += terms[kind] * temperature * temperature;
      }
      expect(loss.get(i), want, 1 + std::abs(want), DType::float32, "kd_loss");
      for (int64_t c = 0; c < classes; ++c) {
        if (!std::isfinite(grad_s.get(i * classes + c) + grad_t.get(i * classes + c)))
          expect(1, 0, 0, dtype, "kd_loss gradient");
      }
    }
  }
}

void gelu_case(DType dtype, int64_t count, int64_t offset) {
  Buffer x(dtype, count, offset), grad(dtype, count, offset), out(dtype, count, offset), slope(dtype, count, offset);
  x.fill();
  grad.fill();
  cpu::gelu({dtype, count, x.data(), nullptr, out.data()}, serial);
  cpu::gelu({dtype, count, x.data(), grad.data(), slope.data()}, serial);
  for (int64_t i = 0; i < count; ++i) {
    const double at = x.get(i), below = std::erfc(-at / std::sqrt(2.0)) / 2;
    const double density = std::exp(-at * at / 2) / std::sqrt(2 * 3.14159265358979);
    expect(out.get(i), at * below, 1 + std::abs(at), dtype, "gelu");
    expect(slope.get(i), grad.get(i) * (below + at * density), 1 + std::abs(grad.get(i)), dtype, "gelu_backward");
  }
}

void attention_kd_case(DType dtype, int64_t tokens, int64_t head_dim, int64_t offset) {
  const int64_t batch = 2, heads[] = {2, tokens % 2 ? 2 : 3}, head_dims[] = {head_dim, 5};
  const DType grad_dtype = dtype == DType::float64 ? dtype : DType::float32;
  const bool average = heads[0] != heads[1] || tokens % 3 == 0;
  const int64_t groups = average ? 1 : heads[0];
  AttentionKD args{AttentionKDKind::kl, average, batch, tokens, {}, {}, nullptr};
  const auto elements = [&](int i) { return batch * tokens * heads[i] * head_dims[i]; };
  Buffer student(dtype, 3 * elements(0), offset), teacher(dtype, 2 * elements(1), offset);
  Buffer grad_s(grad_dtype, 2 * elements(0), offset), grad_t(grad_dtype, 2 * elements(1), offset);
  Buffer loss(grad_dtype, batch * groups, offset);
  Buffer* const inputs[] = {&student, &teacher};
  AttentionSide* const sides[] = {&args.student, &args.teacher};
  std::vector<double> maps[2];  // (batch, heads, queries, keys), or their means, with one head
  for (int i = 0; i < 2; ++i) {
    inputs[i]->fill();
    const int64_t channels = heads[i] * head_dims[i], row = (3 - i) * channels;
    *sides[i] = {dtype, heads[i], head_dims[i], 0.3 / double(head_dims[i]), inputs[i]->data(),
                 {tokens * row, row, channels, head_dims[i]}, (i ? grad_t : grad_s).data()};
    maps[i].assign(static_cast<size_t>(batch * groups * tokens * tokens), 0.0);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads[i]; ++h) {
        auto at = [&](int64_t n, int64_t which, int64_t d) {
          return inputs[i]->get((b * tokens + n) * row + which * channels + h * head_dims[i] + d);
        };
        for (int64_t query = 0; query < tokens; ++query) {
          std::vector<double> p(static_cast<size_t>(tokens), 0.0);
          double sum = 0;
          for (int64_t key = 0; key < tokens; ++key) {
            for (int64_t d = 0; d < head_dims[i]; ++d) p[key] += at(query, 0, d) * at(key, 1, d) * sides[i]->scale;
            sum += p[key] = std::exp(p[key]);
          }
          const int64_t group = b * groups + (average ? 0 : h);
          double* const map = &maps[i][static_cast<size_t>((group * tokens + query) * tokens)];
          for (int64_t key = 0; key < tokens; ++key) map[key] += p[key] / sum / double(average ? heads[i] : 1);
        }
      }
    }
  }
  args.loss = loss.data();
  for (int kind = 0; kind < 2; ++kind) {
    args.kind = AttentionKDKind(kind);
    cpu::attention_kd(args, serial);
    for (int64_t group = 0; group < batch * groups; ++group) {
      double want = 0;
      for (int64_t k = group * tokens * tokens; k < (group + 1) * tokens * tokens; ++k) {
        const double q = maps[0][static_cast<size_t>(k)], p = maps[1][static_cast<size_t>(k)];
        want += (kind ? (p - q) * (p - q) : p * std::log(p / q)) / double(tokens);
      }
      expect(loss.get(group), want, 1, DType::float32, "attention_kd");
    }
    for (const Buffer* grad : {&grad_s, &grad_t}) {
      double total = 0;
      for (int64_t k = 0; k < grad->size; ++k) total += std::abs(grad->get(k));
      if (!(total < 1e3) || (total == 0 && tokens > 1)) expect(1, 0, 0, dtype, "attention_kd's gradient");
    }
  }
}

void shares_case(DType dtype, int64_t tokens, int64_t head_dim, int64_t offset) {
  const int64_t batch = 2, heads = 2, slots = 2 + tokens % 2, channels = heads * head_dim, row = slots * channels;
  const DType precise = dtype == DType::float64 ? dtype : DType::float32;
  std::vector<int64_t> queries, keys;
  for (int64_t n = tokens - 1; n >= tokens / 3; --n) queries.push_back(n);
  for (int64_t n = 0; n < tokens; n += tokens > 20 ? 1 : 2) keys.push_back(n);
  keys.push_back(tokens - 1);  // some of them twice
  const auto count = static_cast<int64_t>(keys.size());
  Buffer qk(dtype, batch * tokens * row, offset), grad_qk(dtype, qk.size, offset);
  Buffer shares(precise, batch * heads * count, offset), grad(precise, shares.size, offset);
  qk.fill();
  grad.fill();
  AttentionShares args{dtype, batch, tokens, slots, heads, head_dim, 0.3 / double(head_dim), qk.data(),
                       {tokens * row, row, channels, head_dim}, static_cast<int64_t>(queries.size()), count,
                       queries.data(), keys.data(), shares.data(), nullptr, nullptr};
  cpu::attention_shares(args, serial);
  args.grad_shares = grad.data();
  args.grad_qk = grad_qk.data();
  cpu::attention_shares(args, serial);
  std::vector<double> slope(static_cast<size_t>(qk.size), 0.0);
  for (int64_t group = 0; group < batch * heads; ++group) {
    const auto at = [&](int64_t n, int64_t slot) {
      return ((group / heads * tokens + n) * slots + slot) * channels + group % heads * head_dim;
    };
    std::vector<double> want(keys.size(), 0.0);
    for (int64_t query : queries) {
      std::vector<double> p(keys.size(), 0.0);
      double sum = 0, mean = 0;
      for (size_t k = 0; k < keys.size(); ++k) {
        const int64_t one = at(query, 0), other = at(keys[k], 1);
        for (int64_t d = 0; d < head_dim; ++d) p[k] += qk.get(one + d) * qk.get(other + d) * args.scale;
        sum += p[k] = std::exp(p[k]);
      }
      const auto weight = [&](size_t k) { return p[k] / sum / double(queries.size()); };
      const auto above = [&](size_t k) { return grad.get(group * count + static_cast<int64_t>(k)); };
      for (size_t k = 0; k < keys.size(); ++k) want[k] += weight(k), mean += p[k] / sum * above(k);
      for (size_t k = 0; k < keys.size(); ++k) {
        const double of_score = weight(k) * (above(k) - mean) * args.scale;
        for (int64_t d = 0; d < head_dim; ++d) {
          slope[static_cast<size_t>(at(query, 0) + d)] += of_score * qk.get(at(keys[k], 1) + d);
          slope[static_cast<size_t>(at(keys[k], 1) + d)] += of_score * qk.get(at(query, 0) + d);
        }
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      expect(shares.get(group * count + k), want[static_cast<size_t>(k)], 1, precise, "attention_shares");
    }
  }
  for (int64_t i = 0; i < qk.size; ++i) {
    const double want = slope[static_cast<size_t>(i)];
    expect(grad_qk.get(i), want, 4 + std::abs(want), dtype, "attention_shares_backward");
  }
}

void density_case(DType dtype, int64_t count, double bandwidth, int64_t offset) {
  const int64_t images = 2, points = 2 * (static_cast<int64_t>(std::ceil(1 / bandwidth)) + 5) + 1;
  Buffer similarities(dtype, images * count, offset), density(dtype, images * points, offset);
  Buffer grad(dtype, density.size, offset), slope(dtype, similarities.size, offset);
  for (int64_t i = 0; i < similarities.size; ++i) similarities.set(i, Buffer::random() / 4);  // from -1 to 1
  grad.fill();
  SimilarityDensity args{dtype, images, count, points, bandwidth, similarities.data(), density.data(), nullptr,
                         nullptr};
  cpu::similarity_density(args, serial);
  args.grad_density = grad.data();
  args.grad_similarities = slope.data();
  cpu::similarity_density(args, serial);
  for (int64_t b = 0; b < images; ++b) {
    std::vector<double> want(static_cast<size_t>(points), 0.0);
    const double scale = 0.39894228040143268 / (bandwidth * double(count));
    for (int64_t m = 0; m < count; ++m) {
      double along = 0;
      for (int64_t i = 0; i < points; ++i) {
        const double d = double(i - points / 2) - similarities.get(b * count + m) / bandwidth;
        want[i] += std::exp(-d * d / 2) * scale;
        along += std::exp(-d * d / 2) * d * scale / bandwidth * grad.get(b * points + i);
      }
      expect(slope.get(b * count + m), along, 10 * scale / bandwidth, DType::float32, "similarity_density_backward");
    }
    for (int64_t i = 0; i < points; ++i) {
      expect(density.get(b * points + i), want[i], 1 / bandwidth, DType::float32, "similarity_density");
    }
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16, DType::float64}) {
    for (int64_t offset : {0, 3}) {
      for (int64_t tokens : {1, 2, 15, 16, 17, 35, 48, 49, 65}) {
        for (int64_t head_dim : {1, 7, 16, 24, 33, 64}) attention_case(dtype, dtype, tokens, head_dim, offset), ++cases;
      }
      if (offset > 0) attention_case(dtype, dtype, dtype == DType::bfloat16 ? 261 : 130, 40, offset), ++cases;
      for (int64_t head_dim : {40, 64}) {
        if (dtype == DType::float32) attention_case(dtype, DType::bfloat16, 33, head_dim, offset), ++cases;
      }
      for (int64_t tokens : {1, 2, 15, 16, 17, 35, 70}) {
        for (int64_t head_dim : {1, 16, 33}) attention_kd_case(dtype, tokens, head_dim, offset), ++cases;
        for (int64_t head_dim : {1, 16, 33}) shares_case(dtype, tokens, head_dim, offset), ++cases;
      }
      for (int64_t classes : {1, 2, 10, 15, 16, 17, 100, 1000}) kd_case(dtype, classes, offset), ++cases;
      if (dtype == DType::float32 || dtype == DType::float64) {
        for (int64_t count : {1, 2, 511, 513}) {
          for (double bandwidth : {0.01, 0.05, 1.0}) density_case(dtype, count, bandwidth, offset), ++cases;
        }
      }
      if (dtype == DType::float64) continue;
      for (int64_t count : {1, 7, 8, 15, 16, 17, 100}) gelu_case(dtype, count, offset), ++cases;
    }
  }
  std::printf("%d cases clean on %s\n", cases, cpu::chosen_isa());
}
