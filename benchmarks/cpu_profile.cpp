// Times attention, forward and backward, on one thread without torch, and notes where the thread is, many times a
// second. cpu_profile.py builds and runs it: cpu_profile DTYPE B H N D SECONDS
#include <signal.h>
#include <time.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../kernels/cpu/isa.h"
#include "../kernels/kernels.h"

using namespace vitkd;

namespace {

constexpr long kEveryNanoseconds = 250'000;
std::vector<const void*> seen;  // filled by the signal's handler, which may not make room
size_t count = 0;

void note(int, siginfo_t*, void* context) {
  const auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  const auto at = reinterpret_cast<const void*>(machine.gregs[REG_RIP]);
#else
  const auto at = reinterpret_cast<const void*>(machine.pc);
#endif
  if (count < seen.size()) seen[count++] = at;
}

void sample(bool on) {
  static timer_t timer;
  static bool made = false;
  if (!made) {
    struct sigaction action = {};
    action.sa_sigaction = note;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigaction(SIGPROF, &action, nullptr);
    sigevent event = {};
    event.sigev_notify = SIGEV_SIGNAL;
    event.sigev_signo = SIGPROF;
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) != 0) std::perror("timer_create"), std::exit(1);
    made = true;
  }
  const timespec every = {0, on ? kEveryNanoseconds : 0};
  const itimerspec setting = {every, every};
  timer_settime(timer, 0, &setting, nullptr);
}

void serial(int64_t count, int64_t, void (*body)(int64_t, int64_t, void*), void* context) { body(0, count, context); }

template <class Call>
void profile(const char* name, double seconds, Call call) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  call();
  seen.assign(static_cast<size_t>(2e9 * seconds / kEveryNanoseconds) + 1, nullptr);
  count = 0;
  std::vector<double> times;
  for (const auto begin = Clock::now(); since(begin) < seconds || times.size() < 5;) {  // undisturbed, for the times
    const auto start = Clock::now();
    call();
    times.push_back(since(start));
  }
  sample(true);
  for (const auto begin = Clock::now(); since(begin) < seconds;) call();
  sample(false);
  std::sort(times.begin(), times.end());
  std::printf("%s %s %.1f %.1f\n", name, cpu::chosen_isa(), times[0] * 1e6, times[times.size() / 2] * 1e6);
  for (size_t i = 0; i < count; ++i) std::printf("%p\n", seen[i]);
}

// A normal distribution, in float32 or, rounded towards zero, in bfloat16.
std::vector<char> random_tensor(DType dtype, int64_t size) {
  static std::mt19937 bits(0);
  std::normal_distribution<float> normal;
  const size_t width = dtype == DType::float32 ? 4 : 2;
  std::vector<char> tensor(static_cast<size_t>(size) * width);
  for (size_t at = 0; at < tensor.size(); at += width) {
    const float x = normal(bits);
    std::memcpy(&tensor[at], reinterpret_cast<const char*>(&x) + 4 - width, width);
  }
  return tensor;
}

}  // namespace

int main(int, char** words) {
  const DType dtype = std::strcmp(words[1], "float32") == 0 ? DType::float32 : DType::bfloat16;
  const int64_t batch = std::atoll(words[2]), heads = std::atoll(words[3]), tokens = std::atoll(words[4]);
  const int64_t head_dim = std::atoll(words[5]), channels = heads * head_dim, row = 3 * channels;
  const double seconds = std::atof(words[6]), scale = 1 / std::sqrt(static_cast<double>(head_dim));
  const auto qkv = random_tensor(dtype, batch * tokens * row),
             grad_out = random_tensor(dtype, batch * tokens * channels);
  auto out = grad_out, grad_qkv = qkv;
  const Attention forward{dtype, dtype, batch, tokens, heads, head_dim, scale,
                          qkv.data(), {tokens * row, row, channels, head_dim}, out.data()};
  const AttentionBackward backward{dtype, dtype, batch, tokens, heads, head_dim, scale,
                                   qkv.data(), {tokens * row, row, channels, head_dim},
                                   grad_out.data(), {tokens * channels, channels, head_dim}, grad_qkv.data()};
  profile("forward", seconds, [&] { cpu::attention(forward, serial); });
  profile("backward", seconds, [&] { cpu::attention_backward(backward, serial); });
}
