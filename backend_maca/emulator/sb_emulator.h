// Runs MACA kernels on a CPU, one block at a time, and reports every rule of the machine that a kernel breaks.
//
// Each thread of a block is a fiber. A fiber runs until it has to wait for others, so a missing barrier shows up as
// a wrong result in at least one of the thread orders (forward, reverse, shuffled). The checks are strict:
//   - a thread that has left the kernel never counts as arrived: barriers reached by only some threads are faults;
//   - threads that meet must meet at the same line, and lanes must name the whole wave in their mask;
//   - shared memory is filled with 0xCD (a huge negative number) before each block.
// A fault ends the launch with a message; the process goes on.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <utility>
#include <vector>

#if !defined(__x86_64__) || defined(SB_UCONTEXT)
#include <ucontext.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
typedef uint3 dim3;

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("sb_shared")))

extern char __start_sb_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_sb_shared[] __attribute__((weak, visibility("hidden")));

namespace sb {

constexpr unsigned kWave = 64, kMaxThreads = 1024;
constexpr unsigned long long kFullWave = ~0ULL;
constexpr size_t kStack = 64 << 10, kSharedBytes = 64 << 10;

// Switching between stacks: a few instructions on x86-64, ucontext elsewhere.

#if defined(__x86_64__) && !defined(SB_UCONTEXT)
struct Context {
  void* stack_pointer;
};
extern "C" void sb_switch(Context* from, Context* to);
__asm__(
    ".text\n.weak sb_switch\n.hidden sb_switch\nsb_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n mov %rsp, (%rdi)\n"
    " mov (%rsi), %rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
inline void prepare(Context& context, char* stack, void (*start)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(start);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
}
inline void change(Context& from, Context& to) { sb_switch(&from, &to); }
#else
typedef ucontext_t Context;
inline void prepare(Context& context, char* stack, void (*start)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
}
inline void change(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// A place where a fixed group of threads meets.
struct Meeting {
  unsigned size = 0, arrived = 0, round = 0;
  int line = 0;
};

struct Wave {
  Meeting meeting;
  uint32_t slots[kWave];
};

struct Thread {
  Context context;
  char* stack = nullptr;
  uint3 index;
  unsigned number = 0;
  const char* waits_at = nullptr;
  const Meeting* waits_for = nullptr;
  bool active = false, done = false;
};

struct Machine {
  uint3 grid, block, block_index;
  std::vector<Thread> threads;
  std::vector<Wave> waves;
  Meeting meeting;
  Thread* running = nullptr;
  Context scheduler;
  bool progress = false;
  void (*body)(const void* kernel, void** arguments);
  const void* kernel;
  void** arguments;
  char fault[300];
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void leave() { change(machine().running->context, machine().scheduler); }

// Ends the launch with a message; the scheduler sees it and resumes nobody.
template <class... A>
void fail(const char* format, A... values) {
  Machine& m = machine();
  const uint3 b = m.block_index;
  const int length = snprintf(m.fault, sizeof m.fault, format, values...);
  const unsigned thread = m.running->number;
  if (length < 200)
    snprintf(m.fault + length, sizeof m.fault - length, " (block %u,%u,%u thread %u)", b.x, b.y, b.z, thread);
  if (m.running->active) leave();
}

inline void meet(Meeting& meeting, const char* what, int line) {
  Machine& m = machine();
  Thread& self = *m.running;
  if (meeting.arrived && meeting.line != line)
    fail("%s in line %d meets one in line %d", what, line, meeting.line);
  meeting.line = line;
  self.waits_at = what;
  self.waits_for = &meeting;
  const unsigned round = meeting.round;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.round;
    m.progress = true;
  }
  while (meeting.round == round) leave();
}

inline void start() {
  Machine& m = machine();
  m.body(m.kernel, m.arguments);
  m.running->done = true;
  m.progress = true;
  for (;;) leave();
}

// Tells which meeting is incomplete; one of a wave explains one of the block, so it comes first.
inline void report_stuck(unsigned count) {
  Machine& m = machine();
  Thread* stuck = nullptr;
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = m.threads[i];
    if (!t.done && (!stuck || (stuck->waits_for == &m.meeting && t.waits_for != &m.meeting))) stuck = &t;
  }
  const Meeting& meeting = *stuck->waits_for;
  const unsigned first = &meeting == &m.meeting ? 0 : stuck->number / kWave * kWave;
  unsigned gone = 0;
  for (unsigned i = first; i < first + meeting.size; ++i) gone += m.threads[i].done;
  m.running = stuck;
  fail("%s in line %d is reached by only %u of %u threads, %u have left the kernel", stuck->waits_at, meeting.line,
       meeting.arrived, meeting.size, gone);
}

enum Order { kForward, kReverse, kShuffled };  // as ORDERS in runtime.py

// The order in which threads get their turn, and blocks theirs.
inline std::vector<unsigned> turns(unsigned count, int order, unsigned seed) {
  std::vector<unsigned> numbers(count);
  for (unsigned i = 0; i < count; ++i) numbers[i] = order == kReverse ? count - 1 - i : i;
  if (order != kShuffled) return numbers;
  uint32_t random = seed * 2654435769u | 1;
  for (unsigned i = count; i > 1; --i) {
    random ^= random << 13, random ^= random >> 17, random ^= random << 5;
    std::swap(numbers[i - 1], numbers[random % i]);
  }
  return numbers;
}

inline void run_block(int order, unsigned seed) {
  Machine& m = machine();
  const unsigned count = m.block.x * m.block.y * m.block.z;
  if (__start_sb_shared) memset(__start_sb_shared, 0xCD, __stop_sb_shared - __start_sb_shared);
  if (m.threads.size() < count) m.threads.resize(count);
  m.waves.assign((count + kWave - 1) / kWave, Wave());
  m.meeting = Meeting{count};
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = m.threads[i];
    if (!t.stack) t.stack = static_cast<char*>(malloc(kStack));
    t.index = {i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y)};
    t.number = i;
    t.done = false;
    ++m.waves[i / kWave].meeting.size;
    prepare(t.context, t.stack, start);
  }
  const std::vector<unsigned> order_of_threads = turns(count, order, seed);
  for (bool live = true; live;) {
    live = m.progress = false;
    for (unsigned i : order_of_threads) {
      Thread& t = m.threads[i];
      if (t.done) continue;
      m.running = &t;
      t.active = true;
      change(m.scheduler, t.context);
      t.active = false;
      if (m.fault[0]) return;
      live = live || !t.done;
    }
    if (live && !m.progress) return report_stuck(count);
  }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}

// Runs a kernel over a grid, one launch at a time; returns a description of the first fault, or null.
template <class... A>
const char* launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, unsigned shared, void** arguments,
                   int order) {
  Machine& m = machine();
  m.grid = {grid[0], grid[1], grid[2]};
  m.block = {block[0], block[1], block[2]};
  m.kernel = reinterpret_cast<const void*>(kernel);
  m.arguments = arguments;
  m.body = [](const void* typed, void** values) {
    call(reinterpret_cast<void (*)(A...)>(const_cast<void*>(typed)), values, std::make_index_sequence<sizeof...(A)>{});
  };
  m.fault[0] = 0;
  const unsigned threads = block[0] * block[1] * block[2], blocks = grid[0] * grid[1] * grid[2];
  if (!threads || threads > kMaxThreads) return "a block has 1 to 1024 threads";
  shared += __stop_sb_shared - __start_sb_shared;
  if (shared > kSharedBytes) return "more than 64 KiB of shared memory";
  for (unsigned i : turns(blocks, order, 1)) {
    m.block_index = {i % m.grid.x, i / m.grid.x % m.grid.y, i / (m.grid.x * m.grid.y)};
    run_block(order, i + 1);
    if (m.fault[0]) return m.fault;
  }
  return nullptr;
}

inline Wave& wave() { return machine().waves[machine().running->number / kWave]; }

inline Meeting& whole_wave(unsigned long long mask, const char* what) {
  Meeting& meeting = wave().meeting;
  if (mask != kFullWave) fail("%s without the full 64-bit mask", what);
  if (meeting.size != kWave) fail("%s in a wave of fewer than 64 threads", what);
  return meeting;
}

}  // namespace sb

#define threadIdx (sb::machine().running->index)
#define blockIdx (sb::machine().block_index)
#define blockDim (sb::machine().block)
#define gridDim (sb::machine().grid)

static inline void __syncthreads(int line = __builtin_LINE()) {
  sb::meet(sb::machine().meeting, "__syncthreads", line);
}

template <class T>
T __shfl_xor_sync(unsigned long long mask, T value, int distance, int width = 64, int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4, "a lane shuffles 4 bytes");
  const char* what = "__shfl_xor_sync";
  sb::Meeting& meeting = sb::whole_wave(mask, what);
  sb::Wave& wave = sb::wave();
  const unsigned lane = sb::machine().running->number % sb::kWave, other = lane ^ distance;
  memcpy(&wave.slots[lane], &value, 4);
  sb::meet(meeting, what, line);
  memcpy(&value, &wave.slots[other / width == lane / width ? other : lane], 4);
  sb::meet(meeting, what, line);
  return value;
}

#define SB_CHECK(condition, message) ((condition) ? (void)0 : sb::fail("%s", message))

// Gives a kernel the one launch signature: grid, block, dynamic shared bytes, arguments by address, thread order.
#define SB_LAUNCHER(name)                                                                                        \
  extern "C" __attribute__((visibility("default"))) const char* sb_launch_##name(                                \
      const unsigned* grid, const unsigned* block, unsigned shared, void** arguments, int order) {               \
    return sb::launch(name, grid, block, shared, arguments, order);                                              \
  }
