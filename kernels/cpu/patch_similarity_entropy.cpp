// The density of an image's similarities at points one bandwidth apart, and its gradient. A kernel is nothing beyond a
// few bandwidths: of each similarity a window of points gets something, all of them at once.
#include "../kernels.h"
#include "shares.h"
#include "simd.h"
#include "workspace.h"

namespace vitkd::cpu::VITKD_ISA {

namespace {

constexpr double kNormal = 0.39894228040143267794;  // 1 / sqrt(2 pi)

// Points from kBefore before the nearest one on: e^(-d^2 / 2) beyond them is 6e-13 for floats, 2e-29 for doubles.
template <class T>
constexpr int64_t kWindow = sizeof(T) == 4 ? 16 : 24;
template <class T>
constexpr int64_t kBefore = kWindow<T> / 2;

template <class T>
constexpr int64_t kVectors = kWindow<T> / kLanes<T>;

// A similarity's place among the points: its nearest one, and how far beyond that it is, in bandwidths. In double, for
// little is left where much is taken off.
template <class T>
struct Place {
  int64_t nearest;
  T beyond;

  Place(T similarity, double inverse_bandwidth, int64_t points) {
    const double end = double(points - 1), at = double(similarity) * inverse_bandwidth + end / 2;
    const double inside = at > 0 ? at < end ? at : end : 0;  // cosines are; NaN is made 0, and shows in `beyond`
    nearest = static_cast<int64_t>(inside + 0.5);
    beyond = T(at - double(nearest));
  }
};

template <class T, int64_t... I>
inline Vec<T> counted(T first, std::integer_sequence<int64_t, I...>) {
  return Vec<T>{T(I)...} + first;
}

// e^(-k^2 / 2) of the window's points, k from the nearest one.
template <class T>
const T* peaks(Workspace& memory) {
  T* const table = memory.take<T>(kWindow<T>);
  for (int64_t i = 0; i < kWindow<T>; ++i) {
    const double k = double(i - kBefore<T>);
    table[i] = T(__builtin_exp(-k * k / 2));
  }
  return table;
}

// Distances d of the window's points from a similarity, in bandwidths, and e^(-d^2 / 2): with d = k - f that is
// e^(-k^2 / 2) times e^(f (k - f / 2)), whose exponent is small, and so is what rounding it does.
template <class T>
struct Window {
  Vec<T> distance[kVectors<T>], weight[kVectors<T>];

  Window(T beyond, const T* peaks) {
    VITKD_UNROLL
    for (int64_t v = 0; v < kVectors<T>; ++v) {
      const Vec<T> k = counted<T>(T(v * kLanes<T> - kBefore<T>), std::make_integer_sequence<int64_t, kLanes<T>>{});
      distance[v] = k - beyond;
      weight[v] = exp2((k - beyond / 2) * (beyond * T(kLog2E))) * load(peaks + v * kLanes<T>);
    }
  }
};

// Adds `parts` rows of a sum to `to`, and begins them anew.
template <class T>
void add_up(T* rows, int64_t parts, int64_t width, T* to) {
  for (int64_t i = 0; i < width; i += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t part = 0; part < parts; ++part) {
      sum += load(rows + part * width + i);
      store(rows + part * width + i, Vec<T>{});
    }
    store(to + i, load(to + i) + sum);
  }
}

// Several sums of windows, by turns, so that one's additions need not wait for the last one's; and few terms in each,
// and few of these in a sum of theirs, so that rounding does not grow with their number: patches that look alike round
// alike.
template <class T>
void density_of(const SimilarityDensity& args, int64_t image, Workspace& memory) {
  constexpr int64_t turns = 4, section = 64, sections = 64;
  const int64_t points = args.points, width = pad<T>(points + kWindow<T>);
  const T* similarities = static_cast<const T*>(args.similarities) + image * args.count;
  T* const parts = memory.take<T>((turns + 2) * width);
  const T* const table = peaks<T>(memory);
  T *const some = parts + turns * width, *const total = some + width;
  for (int64_t i = 0; i < (turns + 2) * width; ++i) parts[i] = 0;
  const auto add = [&](int64_t m) {
    const Place<T> place(similarities[m], 1 / args.bandwidth, points);
    const Window<T> window(place.beyond, table);
    T* at = parts + m % turns * width + place.nearest;
    VITKD_UNROLL
    for (int64_t v = 0; v < kVectors<T>; ++v, at += kLanes<T>) store(at, load(at) + window.weight[v]);
  };
  for (int64_t first = 0; first < args.count; first += section) {
    const int64_t last = first + section < args.count ? first + section : args.count;
    for (int64_t m = first; m < last; ++m) add(m);
    add_up(parts, turns, width, some);
    if (last == args.count || last % (section * sections) == 0) add_up(some, 1, width, total);
  }
  T* const density = static_cast<T*>(args.density) + image * points;
  const T scale = T(kNormal / (args.bandwidth * double(args.count)));
  for (int64_t i = 0; i < points; ++i) density[i] = total[kBefore<T> + i] * scale;
}

template <class T>
void gradient_of(const SimilarityDensity& args, int64_t image, Workspace& memory) {
  const int64_t points = args.points, width = pad<T>(points + kWindow<T>);
  const T* similarities = static_cast<const T*>(args.similarities) + image * args.count;
  const T* const table = peaks<T>(memory);
  T* const grad = memory.take<T>(width);  // with nothing on both sides
  for (int64_t i = 0; i < width; ++i) grad[i] = 0;
  const T* from = static_cast<const T*>(args.grad_density) + image * points;
  for (int64_t i = 0; i < points; ++i) grad[kBefore<T> + i] = from[i];
  T* const to = static_cast<T*>(args.grad_similarities) + image * args.count;
  const T scale = T(kNormal / (args.bandwidth * args.bandwidth * double(args.count)));
  for (int64_t m = 0; m < args.count; ++m) {
    const Place<T> place(similarities[m], 1 / args.bandwidth, points);
    const Window<T> window(place.beyond, table);
    const T* at = grad + place.nearest;
    Vec<T> terms = {};
    VITKD_UNROLL
    for (int64_t v = 0; v < kVectors<T>; ++v) terms += load(at + v * kLanes<T>) * window.weight[v] * window.distance[v];
    to[m] = sum<T>(terms) * scale;
  }
}

template <class T>
void run(const SimilarityDensity& args, ParallelFor parallel_for) {
  const bool backward = args.grad_density != nullptr;
  Shares images(args.images, args.count >= 4096 ? 1 : 4096 / (args.count + 1) + 1);
  images.among(parallel_for, [&](Shares::Walk walk) {
    Workspace memory;
    for (Range mine = walk.take(); !mine.empty(); mine = walk.take()) {
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        memory.rewind();
        backward ? gradient_of<T>(args, i, memory) : density_of<T>(args, i, memory);
      }
    }
  });
}

}  // namespace

void similarity_density(const SimilarityDensity& args, ParallelFor parallel_for) {
  args.dtype == DType::float64 ? run<double>(args, parallel_for) : run<float>(args, parallel_for);
}

}  // namespace vitkd::cpu::VITKD_ISA
