// A CUDA thread block on one CPU thread: every device thread is a fiber that runs until it must wait for others.
// Shared memory is a heap block of exactly the requested size, so that AddressSanitizer sees its bounds, and is
// filled with NaN bits, so that what was never written shows. Which waiting thread goes next, and whether an
// asynchronous copy lands at once or as late as allowed, is the schedule's choice: a missing barrier changes results.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

namespace simt {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::fflush(stderr);
  std::abort();
}

enum class Schedule { ascending, descending, random };

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Context {
#if defined(__x86_64__)
  void* top = nullptr;  // of its stack, while it does not run
#else
  ucontext_t registers;
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  Context context;
  void* argument = nullptr;           // of the warp collective it waits in
  std::vector<std::vector<Copy>> groups;  // committed asynchronous copies, oldest first
  std::vector<Copy> open_group;
  std::vector<std::vector<std::function<void()>>> committed;  // asynchronous products, oldest group first
  std::vector<std::function<void()>> products;
};

struct Warp {
  int arrived = 0;
  const void* operation = nullptr;
};

// The block that runs now.
struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warp> warpgroups;  // of four
  std::vector<uint32_t> ready;  // per warp, a bit per lane that can run
  int alive = 0, at_barrier = 0;
  int current = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Context scheduler;
  std::function<void()> body;
};

inline Block block;
inline Schedule schedule = Schedule::ascending;
inline uint64_t random_state = 1;
inline size_t max_shared = 227 * 1024;  // of a block: sm_90 and sm_100; 163 KiB on sm_80, 99 on sm_86, sm_89, sm_120

inline bool warpgroups = false;         // whether the device has wgmma
inline bool slots = true;               // whether a launch can count its blocks

inline uint32_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(random_state >> 33);
}

inline void land(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}

// The next thread that can run, or -1.
inline int choose() {
  const int warps = static_cast<int>(block.ready.size());
  const int offset = schedule == Schedule::random ? static_cast<int>(random_bits() % warps) : 0;
  for (int i = 0; i < warps; ++i) {
    const int warp = schedule == Schedule::descending ? warps - 1 - i : (i + offset) % warps;
    uint32_t lanes = block.ready[warp];
    if (!lanes) continue;
    if (schedule == Schedule::descending) return warp * kWarp + 31 - __builtin_clz(lanes);
    if (schedule == Schedule::random)
      for (int skip = random_bits() % __builtin_popcount(lanes); skip > 0; --skip) lanes &= lanes - 1;
    return warp * kWarp + __builtin_ctz(lanes);
  }
  return -1;
}

#if defined(__x86_64__)
// Saves what a function must keep and continues the other context where it did so: swapcontext without its two system
// calls, and longjmp without what AddressSanitizer does before anything that does not return.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
  .text
  .weak simt_switch
  .type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#endif

// Makes a context that begins with `main`, which never returns.
inline void prepare(Context& context, void* stack, size_t bytes, void (*main)()) {
  context.stack = stack;
  context.stack_bytes = bytes;
#if defined(__x86_64__)
  void** top = static_cast<void**>(stack) + bytes / sizeof(void*);
  *--top = nullptr;  // where main would return to; its stack is aligned as after a call
  *--top = reinterpret_cast<void*>(main);
  context.top = top - 6;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = bytes;
  makecontext(&context.registers, main, 0);
#endif
}

inline void jump(Context& from, Context& to, [[maybe_unused]] bool leaving = false) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(leaving ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__)
  simt_switch(&from.top, to.top);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void resume_next(Context& from, bool leaving = false);

// Stops the current thread until another one marks it ready again.
inline void wait() {
  const int self = block.current;
  block.ready[self / kWarp] &= ~(1u << self % kWarp);
  resume_next(block.threads[self].context);
}

inline void thread_main() {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!block.scheduler.stack) block.scheduler.stack = stack, block.scheduler.stack_bytes = bytes;
#endif
  block.body();
  Thread& self = block.threads[block.current];
  for (const auto& group : self.groups) self.open_group.insert(self.open_group.end(), group.begin(), group.end());
  if (!self.open_group.empty()) fail("a thread ended without waiting for its copies");
  if (!self.committed.empty() || !self.products.empty()) fail("a thread ended without waiting for its products");
  --block.alive;
  block.ready[block.current / kWarp] &= ~(1u << block.current % kWarp);
  resume_next(self.context, true);
}

}  // namespace simt

inline simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

inline void resume_next(Context& from, bool leaving) {
  const int next = choose();
  if (next < 0) {
    if (block.alive) fail("deadlock: a barrier or warp operation that not every thread reaches");
    jump(from, block.scheduler, leaving);
    return;
  }
  block.current = next;
  threadIdx.x = next;
  Context& to = block.threads[next].context;
  if (&to != &from) jump(from, to, leaving);
}

// All threads of a group meet; the last one to come runs `combine(arguments)` for all.
template <int kThreads, class Argument, class Combine>
void collective(Warp& group, const void* operation, Argument& argument, Combine combine) {
  const int first = block.current / kThreads * kThreads;
  if (group.arrived++ == 0) group.operation = operation;
  if (group.operation != operation) fail("the threads of a group are in different operations");
  block.threads[block.current].argument = &argument;
  if (group.arrived < kThreads) return wait();
  Argument* arguments[kThreads];
  for (int i = 0; i < kThreads; ++i) arguments[i] = static_cast<Argument*>(block.threads[first + i].argument);
  combine(arguments);
  group.arrived = 0;
  for (int i = 0; i < kThreads; i += kWarp) block.ready[(first + i) / kWarp] = 0xffffffffu;
}
template <class Argument, class Combine>
void warp_collective(const void* operation, Argument& argument, Combine combine) {
  collective<kWarp>(block.warps[block.current / kWarp], operation, argument, combine);
}
template <class Argument, class Combine>
void warpgroup_collective(const void* operation, Argument& argument, Combine combine) {
  collective<4 * kWarp>(block.warpgroups[block.current / (4 * kWarp)], operation, argument, combine);
}

inline void* new_stack() {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE)) fail("no memory for a thread's stack");
  return memory;
}

inline void run_block(int threads, size_t shared_bytes, const std::function<void()>& body) {
  static std::vector<void*> stacks;
  while (static_cast<int>(stacks.size()) < threads) stacks.push_back(new_stack());
  block.threads.assign(threads, Thread{});
  block.warps.assign(threads / kWarp, Warp{});
  block.warpgroups.assign(threads / (4 * kWarp), Warp{});
  block.ready.assign(threads / kWarp, 0xffffffffu);
  block.alive = threads;
  block.at_barrier = 0;
  block.body = body;
  block.shared_bytes = shared_bytes;
  void* shared = nullptr;
  if (posix_memalign(&shared, 1024, shared_bytes)) fail("no memory for shared memory");
  block.shared = static_cast<unsigned char*>(shared);
  std::memset(block.shared, 0xff, shared_bytes);
  for (int i = 0; i < threads; ++i) {
    prepare(block.threads[i].context, static_cast<char*>(stacks[i]) + 4096, kStackBytes - 4096, thread_main);
  }
  resume_next(block.scheduler);
  std::free(block.shared);
}

inline void run_grid(int64_t grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  if (threads % kWarp || threads > 1024) fail("a block must be whole warps, at most 32");
  if (shared_bytes > max_shared) fail("more shared memory than the device has");
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(grid), 1, 1};
  for (int64_t i = 0; i < grid; ++i) {
    blockIdx.x = static_cast<unsigned>(schedule == Schedule::descending ? grid - 1 - i : i);
    run_block(threads, shared_bytes, body);
  }
}

}  // namespace simt

inline void __syncthreads() {
  using simt::block;
  if (++block.at_barrier < static_cast<int>(block.threads.size())) return simt::wait();
  block.at_barrier = 0;
  block.ready.assign(block.ready.size(), 0xffffffffu);
}

inline void __syncwarp() {
  static const char operation = 0;
  int nothing = 0;
  simt::warp_collective(&operation, nothing, [](int**) {});
}
