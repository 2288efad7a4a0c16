// Runs MACA kernels on a CPU, one block at a time, and reports every rule of the machine that a kernel breaks.
//
// Threads run as fibers. One runs until it has to wait for others, so a missing barrier shows up as a wrong result in
// at least one of the thread orders (forward, reverse, shuffled). A thread that never waits needs no fiber of its own:
// the next one starts on the same stack. What is checked:
//   - a thread that has left the kernel never counts as arrived: barriers reached by only some threads are faults;
//   - threads that meet must meet at the same line, and lanes must name the whole wave in their mask;
//   - every load and store, by calls that the compiler inserts (those of -fsanitize=thread): it must lie inside an
//     argument's buffer or in shared memory; between two barriers of the block, an element that one thread writes is
//     read and written by no other;
//   - shared memory reads as not-a-number until the block has written it;
//   - indices into arrays of known size, alignment of vectors, division by zero (by calls of -fsanitize=undefined).
// A fault ends the launch with a message; the process goes on.
#include "sb_machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__x86_64__) || defined(SB_UCONTEXT)
#include <ucontext.h>
#endif

extern char __ehdr_start[] __attribute__((visibility("hidden")));  // this library, from its head to its end
extern char _end[] __attribute__((visibility("hidden")));

namespace {

constexpr unsigned kWave = 64, kMaxThreads = 1024, kMaxBuffers = 512, kBarriers = (1 << 21) - 1;
constexpr unsigned long long kFullWave = ~0ULL;
constexpr size_t kStack = 64 << 10, kSharedBytes = 64 << 10;
const unsigned char kPoison[] = {0xCD, 0xFF};  // f32, f16 and bf16 of these bytes are not-a-number, integers are odd

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
void prepare(Context& context, char* stack, size_t bytes, void (*start)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(start);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
}
void change(Context& from, Context& to) { sb_switch(&from, &to); }
#else
typedef ucontext_t Context;
void prepare(Context& context, char* stack, size_t bytes, void (*start)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
}
void change(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// A place where a fixed group of threads meets.
struct Meeting {
  unsigned size, arrived, round;
  int line;
};

// What a lane shows the others. Rounds alternate between two slots: nobody is two meetings ahead.
struct Slot {
  uint64_t x, y;
};
struct Wave {
  Meeting meeting;
  unsigned begin, end;  // of its threads in the order of the block
  Slot slots[2][kWave];
};

struct Fiber {
  Context context;
  bool ready;
};
struct Thread {
  uint3 index;
  unsigned number, position;  // in the block, and in the order of its threads
  Fiber* fiber;
  const Meeting* waits_for;
  unsigned waits_round;
  const char* waits_at;
  bool done;
};

// Who wrote or read a byte last: the block's number among all ever run, how many barriers the block had passed, the
// thread, and whether other threads did, too, since that barrier.
struct Access {
  uint64_t block : 32, barriers : 21, several : 1, thread : 10;
};
struct Buffer {
  const char* start;
  uint64_t bytes;
  Access *writers, *readers;
  uint64_t noted_bytes;  // for which there are writers and readers
  bool writable;
};

struct Machine {
  uint3 grid, block, block_index;
  unsigned count;  // threads of the block
  Thread threads[kMaxThreads];
  Wave waves[kMaxThreads / kWave];
  Fiber fibers[kMaxThreads];
  Fiber* idle[kMaxThreads];
  unsigned idle_count;
  char* stacks;
  Meeting meeting;
  Thread* running;
  unsigned order[kMaxThreads], next, end;  // in which threads start
  Context scheduler;
  sb_body body;
  const void* kernel;
  void** arguments;
  Buffer buffers[kMaxBuffers];
  unsigned buffer_count;
  uint32_t block_number, first_block;  // among all blocks that this machine has run
  Buffer shared, dynamic, *recent;
  char* dynamic_memory;
  char fault[400];
};
Machine m;

void leave() {
  Fiber* fiber = m.running->fiber;
  change(fiber->context, m.scheduler);
}

// Ends the launch with a message; the scheduler sees it and resumes nobody.
__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  const int length = vsnprintf(m.fault, 300, format, values);
  va_end(values);
  const uint3 b = m.block_index;
  const unsigned at = length < 299 ? length : 299;
  snprintf(m.fault + at, sizeof m.fault - at, " (block %u,%u,%u thread %u)", b.x, b.y, b.z, m.running->number);
  if (m.running->fiber) leave();
}

bool can_go_on(const Thread& t) { return !t.done && t.waits_for->round != t.waits_round; }

// Lets the next lane of the wave that can go on do so, else the scheduler, which also starts those that have not begun.
void pass_on() {
  Thread& self = *m.running;
  const Wave& own = m.waves[self.number / kWave];
  if (m.next < m.end) return leave();
  for (unsigned i = self.position + 1; i != self.position; ++i) {
    if (i >= own.end && (i = own.begin) == self.position) break;
    Thread& t = m.threads[m.order[i]];
    if (!can_go_on(t)) continue;
    m.running = &t;
    return change(self.fiber->context, t.fiber->context);
  }
  leave();
}

void meet(Meeting& meeting, const char* what, int line) {
  Thread& self = *m.running;
  if (meeting.arrived && meeting.line != line) fail("%s in line %d meets one in line %d", what, line, meeting.line);
  meeting.line = line;
  self.waits_at = what;
  self.waits_for = &meeting;
  self.waits_round = meeting.round;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    pass_on();
  }
}

Wave& wave() { return m.waves[m.running->number / kWave]; }

// Shows the others of the wave what this lane holds; returns what all of them hold.
const Slot* exchange(const char* what, int line, uint64_t x, uint64_t y = 0) {
  Wave& own = wave();
  if (own.meeting.size != kWave) fail("%s in line %d in a wave of fewer than 64 threads", what, line);
  Slot* slots = own.slots[own.meeting.round & 1];
  slots[m.running->number % kWave] = {x, y};
  meet(own.meeting, what, line);
  return slots;
}

void need_full(unsigned long long mask, const char* what, int line) {
  if (mask != kFullWave) fail("%s in line %d without the full 64-bit mask", what, line);
}

// A fiber runs one thread after the other, until one has to wait.
void work() {
  Fiber* self = m.running->fiber;
  for (;;) {
    while (m.next < m.end) {
      m.running = &m.threads[m.order[m.next++]];
      m.running->fiber = self;
      m.body(m.kernel, m.arguments);
      m.running->done = true;
    }
    m.idle[m.idle_count++] = self;
    change(self->context, m.scheduler);
    self = m.running->fiber;
  }
}

void start_fiber() {
  Fiber* fiber = m.idle[--m.idle_count];
  m.running = &m.threads[m.order[m.next]];
  m.running->fiber = fiber;
  if (!fiber->ready) {
    const size_t number = fiber - m.fibers, colour = number % 31 * 192;  // stacks share few cache sets
    prepare(fiber->context, m.stacks + number * kStack, kStack - colour, work);
    fiber->ready = true;
  }
  change(m.scheduler, fiber->context);
}

void reset_fibers() {
  m.idle_count = 0;
  for (unsigned i = kMaxThreads; i > 0; --i) {
    m.fibers[i - 1].ready = false;
    m.idle[m.idle_count++] = &m.fibers[i - 1];
  }
}

// Tells which meeting is incomplete; one of a wave explains one of the block, so it comes first.
void report_stuck() {
  Thread* stuck = nullptr;
  for (unsigned i = 0; i < m.count; ++i) {
    Thread& t = m.threads[i];
    if (!t.done && (!stuck || (stuck->waits_for == &m.meeting && t.waits_for != &m.meeting))) stuck = &t;
  }
  const Meeting& meeting = *stuck->waits_for;
  const unsigned first = &meeting == &m.meeting ? 0 : stuck->number / kWave * kWave;
  unsigned gone = 0;
  for (unsigned i = first; i < first + meeting.size; ++i) gone += m.threads[i].done;
  m.running = stuck;
  stuck->fiber = nullptr;
  fail("%s in line %d is reached by only %u of %u threads, %u have left the kernel", stuck->waits_at, meeting.line,
       meeting.arrived, meeting.size, gone);
}

enum Order { kForward, kReverse, kShuffled };  // as ORDERS in runtime.py

// The order in which threads get their turn, and blocks theirs.
void turns(unsigned* numbers, unsigned count, int order, unsigned seed) {
  for (unsigned i = 0; i < count; ++i) numbers[i] = order == kReverse ? count - 1 - i : i;
  if (order != kShuffled) return;
  uint32_t random = seed * 2654435769u | 1;
  for (unsigned i = count; i > 1; --i) {
    random ^= random << 13, random ^= random >> 17, random ^= random << 5;
    const unsigned other = random % i, kept = numbers[i - 1];
    numbers[i - 1] = numbers[other], numbers[other] = kept;
  }
}

unsigned lanes_of(unsigned wave) {
  const unsigned left = m.count - wave * kWave;
  return left < kWave ? left : kWave;
}

// Puts the threads of the block into the order of their turns, those of a wave side by side.
void order_threads(int order, unsigned seed) {
  unsigned waves[kMaxThreads / kWave], lanes[kWave], filled = 0;
  const unsigned count = (m.count + kWave - 1) / kWave;
  turns(waves, count, order, seed);
  for (unsigned w = 0; w < count; ++w) {
    const unsigned first = waves[w] * kWave, size = lanes_of(waves[w]);
    turns(lanes, size, order, seed + w);
    m.waves[waves[w]].begin = filled;
    for (unsigned i = 0; i < size; ++i, ++filled) {
      m.order[filled] = first + lanes[i];
      m.threads[first + lanes[i]].position = filled;
    }
    m.waves[waves[w]].end = filled;
  }
}

// Runs the threads of a wave until each waits for other waves or has left; returns whether any could run.
bool run_wave(unsigned begin, unsigned end) {
  bool any = false;
  for (bool more = true; more;) {
    more = false;
    for (unsigned i = begin; i < end; ++i) {
      Thread& t = m.threads[m.order[i]];
      if (!can_go_on(t)) continue;
      any = more = true;
      m.running = &t;
      change(m.scheduler, t.fiber->context);
      if (m.fault[0]) return false;
    }
  }
  return any;
}

void run_block(int order, unsigned seed) {
  ++m.block_number;
  m.meeting = {m.count, 0, 0, 0};
  for (unsigned w = 0; w * kWave < m.count; ++w) m.waves[w].meeting = {lanes_of(w), 0, 0, 0};
  for (unsigned i = 0; i < m.count; ++i) {
    m.threads[i].fiber = nullptr;
    m.threads[i].done = false;
  }
  if (order == kShuffled) order_threads(order, seed);
  bool started = false;
  for (bool any = true; any && !m.fault[0]; started = true) {
    any = !started;
    unsigned end = 0;
    for (unsigned begin = 0; begin < m.count && !m.fault[0]; begin = end) {
      end = begin + lanes_of(m.order[begin] / kWave);
      m.next = started ? end : begin;
      m.end = end;
      while (m.next < m.end && !m.fault[0]) start_fiber();
      if (!m.fault[0]) any = run_wave(begin, end) || any;
    }
  }
  for (unsigned i = 0; i < m.count && !m.fault[0]; ++i)
    if (!m.threads[i].done) report_stuck();
}

// The checks of loads and stores.

bool holds(const Buffer& buffer, const char* at, size_t size) {
  return at >= buffer.start && at + size <= buffer.start + buffer.bytes;
}

const char* source_line(const void* caller) {  // filled in by runtime.py, which knows the debug information
  static char text[40];
  snprintf(text, sizeof text, "{pc %p}", caller);
  return text;
}

__attribute__((noinline)) void outside(const char* at, size_t size, bool write, const void* caller) {
  unsigned nearest = 0;
  int64_t distance = INT64_MAX;
  for (unsigned i = 0; i < m.buffer_count; ++i) {
    const int64_t before = m.buffers[i].start - at, behind = at - m.buffers[i].start - int64_t(m.buffers[i].bytes);
    const int64_t apart = before > behind ? before : behind;
    if (apart < distance) nearest = i, distance = apart;
  }
  const Buffer& b = m.buffers[nearest];
  fail("%s %s %zu bytes outside all buffers; the nearest is pointer argument %u: its byte %lld of %llu",
       source_line(caller), write ? "writes" : "reads", size, nearest, (long long)(at - b.start),
       (unsigned long long)b.bytes);
}

// Whether another thread of this launch may have used a byte at the same time. (In shared memory, a block sees no
// other's.)
bool races(const Access& other, bool shared) {
  if (other.block != m.block_number) return !shared && other.block >= m.first_block;
  return (other.several || other.thread != m.running->number) && other.barriers == (m.meeting.round & kBarriers);
}

__attribute__((noinline)) void report_race(const Access& other, bool shared, const char* verb, const char* done,
                                           const void* caller) {
  const char* owner = other.block == m.block_number ? "the block" : "another block";
  fail("%s %s %s memory that thread %u of %s has %s, without a barrier between them", source_line(caller), verb,
       shared ? "shared" : "global", unsigned(other.thread), owner, done);
}

__attribute__((noinline)) void make_notes(Buffer& buffer) {
  free(buffer.writers);
  free(buffer.readers);
  buffer.writers = static_cast<Access*>(calloc(buffer.bytes, sizeof(Access)));
  buffer.readers = static_cast<Access*>(calloc(buffer.bytes, sizeof(Access)));
  buffer.noted_bytes = buffer.bytes;
}

// The sizes below are constants where they are called often, so these are compiled once for each.
#define SB_EACH_SIZE inline __attribute__((always_inline))

SB_EACH_SIZE Access own_access() { return {m.block_number, m.meeting.round & kBarriers, 0, m.running->number}; }

SB_EACH_SIZE void note_write(Buffer& buffer, bool shared, const char* at, size_t size, const void* caller) {
  if (buffer.noted_bytes < buffer.bytes) make_notes(buffer);
  const Access self = own_access();
  const size_t start = at - buffer.start;
  for (size_t i = start; i < start + size; ++i) {
    if (races(buffer.writers[i], shared)) report_race(buffer.writers[i], shared, "writes", "written", caller);
    if (races(buffer.readers[i], shared)) report_race(buffer.readers[i], shared, "writes", "read", caller);
    buffer.writers[i] = self;
  }
}

SB_EACH_SIZE void note_read(Buffer& buffer, bool shared, char* at, size_t size, const void* caller) {
  if (!buffer.writable) return;
  if (buffer.noted_bytes < buffer.bytes) make_notes(buffer);
  Access self = own_access();
  const size_t start = at - buffer.start;
  for (size_t i = start; i < start + size; ++i) {
    const Access writer = buffer.writers[i], reader = buffer.readers[i];
    if (shared && writer.block != m.block_number) at[i - start] = kPoison[i & 1];
    if (races(writer, shared)) report_race(writer, shared, "reads", "written", caller);
    self.several = reader.block == self.block && reader.barriers == self.barriers &&
                   (reader.several || reader.thread != self.thread);
    buffer.readers[i] = self;
  }
}

__attribute__((noinline)) Buffer* find(const char* at, size_t size) {
  if (holds(m.shared, at, size)) return m.recent = &m.shared;
  if (holds(m.dynamic, at, size)) return m.recent = &m.dynamic;
  for (unsigned i = 0; i < m.buffer_count; ++i)
    if (holds(m.buffers[i], at, size)) return m.recent = &m.buffers[i];
  return nullptr;
}

SB_EACH_SIZE void access(char* at, size_t size, bool write, const void* caller) {
  Buffer* found = holds(*m.recent, at, size) ? m.recent : find(at, size);
  if (found) {
    const bool shared = found == &m.shared || found == &m.dynamic;
    return write ? note_write(*found, shared, at, size, caller) : note_read(*found, shared, at, size, caller);
  }
  const bool own = size_t(at - m.stacks) < kMaxThreads * kStack;
  const bool constant = !write && at >= __ehdr_start && at < _end;  // tables that compilers make
  if (m.buffer_count && !own && !constant) outside(at, size, write, caller);
}

float from_half(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa ? __builtin_nanf("") : sign * __builtin_inff();
  return sign * __builtin_ldexpf(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
}

float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Element ``k`` of what a lane holds of X or Y.
template <sb_mma_kind kind>
auto element(uint64_t held, int k) {
  if constexpr (kind == SB_MMA_I8) return int(int8_t(held >> 8 * k));
  if constexpr (kind == SB_MMA_F16) return from_half(uint16_t(held >> 16 * k));
  if constexpr (kind == SB_MMA_BF16) return from_bits(uint32_t(held >> 16 * k) << 16);
  if constexpr (kind == SB_MMA_TF32) return from_bits(uint32_t(held >> 32 * k) & 0xffffe000);  // 10 bits are kept
  if constexpr (kind == SB_MMA_F32) return from_bits(uint32_t(held));
  if constexpr (kind == SB_MMA_F64) {
    double wide;
    memcpy(&wide, &held, 8);
    return wide;
  }
}

// A lane's four values of D are rows 4 * (lane / 16) + v of column lane % 16; X and Y have rows lane % 16, and columns
// in order of lane / 16. Sums run in order of k: the order in the hardware is not documented.
template <sb_mma_kind kind, int held>
void multiply(const Slot* slots, void* c) {
  decltype(element<kind>(0, 0)) sums[4];
  memcpy(sums, c, sizeof sums);
  const int lane = m.running->number % kWave, column = lane % 16, first = 4 * (lane / 16);
  for (int quarter = 0; quarter < 4; ++quarter)
    for (int k = 0; k < held; ++k) {
      const auto y = element<kind>(slots[16 * quarter + column].y, k);
      for (int v = 0; v < 4; ++v) sums[v] += element<kind>(slots[16 * quarter + first + v].x, k) * y;
    }
  memcpy(c, sums, sizeof sums);
}

}  // namespace

extern "C" {

uint3 sb_thread_index() { return m.running->index; }
uint3 sb_block_index() { return m.block_index; }
uint3 sb_block_size() { return m.block; }
uint3 sb_grid_size() { return m.grid; }
unsigned sb_lane() { return m.running->number % kWave; }
void* sb_dynamic_shared() { return m.dynamic_memory; }

void sb_barrier(int line) { meet(m.meeting, "__syncthreads", line); }

void sb_wave_barrier(unsigned long long mask, int line) {
  need_full(mask, "__syncwarp", line);
  exchange("__syncwarp", line, 0);
}

uint32_t sb_shuffle_xor(unsigned long long mask, uint32_t value, int distance, int width, int line) {
  const char* what = "__shfl_xor_sync";
  need_full(mask, what, line);
  const Slot* slots = exchange(what, line, value);
  const unsigned lane = sb_lane(), other = (lane ^ distance) % kWave;  // a width is a power of two
  return slots[(lane ^ other) < unsigned(width) ? other : lane].x;
}

unsigned long long sb_ballot(unsigned long long mask, int predicate, int line) {
  need_full(mask, "__ballot_sync", line);
  const Slot* slots = exchange("__ballot_sync", line, predicate != 0);
  unsigned long long votes = 0;
  for (unsigned lane = 0; lane < kWave; ++lane) votes |= (unsigned long long)slots[lane].x << lane;
  return votes;
}

void sb_mma(sb_mma_kind kind, uint64_t x, uint64_t y, void* c, int line) {
  const Slot* slots = exchange("__builtin_mxc_mma", line, x, y);
  switch (kind) {
    case SB_MMA_I8: return multiply<SB_MMA_I8, 4>(slots, c);
    case SB_MMA_F16: return multiply<SB_MMA_F16, 4>(slots, c);
    case SB_MMA_BF16: return multiply<SB_MMA_BF16, 4>(slots, c);
    case SB_MMA_TF32: return multiply<SB_MMA_TF32, 2>(slots, c);
    case SB_MMA_F32: return multiply<SB_MMA_F32, 1>(slots, c);
    case SB_MMA_F64: return multiply<SB_MMA_F64, 1>(slots, c);
  }
}

void sb_fail(const char* message, int line) { fail("%s, in line %d", message, line); }

// Names the memory that the pointer arguments of the next launches may touch; with none, only shared memory is checked.
void sb_buffers(const sb_buffer* buffers, unsigned count) {
  m.buffer_count = count < kMaxBuffers ? count : kMaxBuffers;
  for (unsigned i = 0; i < m.buffer_count; ++i) {
    m.buffers[i].start = buffers[i].start;
    m.buffers[i].bytes = buffers[i].bytes;
  }
}

const char* sb_run(sb_body body, const void* kernel, const unsigned* grid, const unsigned* block, unsigned shared,
                   void** arguments, const bool* writable, unsigned argument_count, int order, char* shared_start,
                   char* shared_end) {
  m.grid = {grid[0], grid[1], grid[2]};
  m.block = {block[0], block[1], block[2]};
  m.body = body;
  m.kernel = kernel;
  m.arguments = arguments;
  m.fault[0] = 0;
  m.count = block[0] * block[1] * block[2];
  const unsigned blocks = grid[0] * grid[1] * grid[2];
  if (!m.count || m.count > kMaxThreads) return "a block has 1 to 1024 threads";
  if (shared > kSharedBytes) return "more than 64 KiB of shared memory";
  if (!m.stacks) {
    m.stacks = static_cast<char*>(malloc(kMaxThreads * kStack));
    m.dynamic_memory = static_cast<char*>(aligned_alloc(kSharedBytes, kSharedBytes));
    reset_fibers();
  }
  m.shared.start = shared_start;
  m.shared.bytes = shared_end - shared_start;
  m.dynamic.start = m.dynamic_memory;
  m.dynamic.bytes = shared;
  m.shared.writable = m.dynamic.writable = true;
  for (unsigned i = 0; i < m.buffer_count; ++i) {
    m.buffers[i].writable = false;
    for (unsigned k = 0; k < argument_count; ++k)
      if (writable[k] && *static_cast<char**>(arguments[k]) == m.buffers[i].start) m.buffers[i].writable = true;
  }
  m.recent = &m.shared;
  m.first_block = m.block_number + 1;
  for (unsigned i = 0; i < m.count; ++i) {
    m.threads[i].index = {i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y)};
    m.threads[i].number = i;
  }
  order_threads(order, 1);
  unsigned* turn = static_cast<unsigned*>(malloc(blocks * sizeof(unsigned)));
  turns(turn, blocks, order, 1);
  for (unsigned k = 0; k < blocks && !m.fault[0]; ++k) {
    const unsigned i = turn[k];
    m.block_index = {i % m.grid.x, i / m.grid.x % m.grid.y, i / (m.grid.x * m.grid.y)};
    run_block(order, i + 1);
  }
  free(turn);
  if (!m.fault[0]) return nullptr;
  reset_fibers();
  return m.fault;
}

// What the compiler calls before loads and stores, and where it knows an error.

#define SB_ACCESS(kind, bytes, write) \
  void __tsan_##kind##bytes(void* at) { access(static_cast<char*>(at), bytes, write, __builtin_return_address(0)); }
#define SB_ACCESSES(bytes)                \
  SB_ACCESS(read, bytes, false)           \
  SB_ACCESS(write, bytes, true)           \
  SB_ACCESS(unaligned_read, bytes, false) \
  SB_ACCESS(unaligned_write, bytes, true)
SB_ACCESSES(1)
SB_ACCESSES(2)
SB_ACCESSES(4)
SB_ACCESSES(8)
SB_ACCESSES(16)
void __tsan_read_range(void* at, size_t size) { access(static_cast<char*>(at), size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t size) { access(static_cast<char*>(at), size, true, __builtin_return_address(0)); }
void* __tsan_memset(void* to, int byte, size_t size) {
  access(static_cast<char*>(to), size, true, __builtin_return_address(0));
  return memset(to, byte, size);
}
void* __tsan_memmove(void* to, const void* from, size_t size) {
  access(static_cast<char*>(const_cast<void*>(from)), size, false, __builtin_return_address(0));
  access(static_cast<char*>(to), size, true, __builtin_return_address(0));
  return memmove(to, from, size);
}
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  access(static_cast<char*>(const_cast<void*>(from)), size, false, __builtin_return_address(0));
  access(static_cast<char*>(to), size, true, __builtin_return_address(0));
  return memcpy(to, from, size);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

struct sb_place {  // the start of all records of -fsanitize=undefined
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_out_of_bounds_abort(sb_place* place, uintptr_t index) {
  fail("line %u reads or writes element %lld outside an array", place->line, (long long)index);
}
void __ubsan_handle_divrem_overflow_abort(sb_place* place, uintptr_t, uintptr_t) {
  fail("line %u divides by zero", place->line);
}
void __ubsan_handle_type_mismatch_v1_abort(sb_place* place, uintptr_t at) {
  fail("line %u reads or writes a vector that is not aligned, at ...%03llx", place->line, (unsigned long long)(at & 0xfff));
}
}
