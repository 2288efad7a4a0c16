// What kernels that were built for the emulator call: the machine in sb_machine.cpp.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct uint3 {
  unsigned x, y, z;
};
typedef uint3 dim3;

// Memory that an argument of the next launch points to.
struct sb_buffer {
  const char* start;
  uint64_t bytes;
};

enum sb_mma_kind { SB_MMA_I8, SB_MMA_F16, SB_MMA_BF16, SB_MMA_TF32, SB_MMA_F32, SB_MMA_F64 };

extern "C" {
// Constant while a thread runs, so calls are merged.
__attribute__((const)) uint3 sb_thread_index();
__attribute__((const)) uint3 sb_block_index();
__attribute__((const)) uint3 sb_block_size();
__attribute__((const)) uint3 sb_grid_size();
__attribute__((const)) unsigned sb_lane();
__attribute__((const)) void* sb_dynamic_shared();

void sb_barrier(int line);
void sb_wave_barrier(unsigned long long mask, int line);
uint32_t sb_shuffle_xor(unsigned long long mask, uint32_t value, int distance, int width, int line);
unsigned long long sb_ballot(unsigned long long mask, int predicate, int line);
// D = X Y^T + C on 16x16 tiles; a lane holds up to 8 bytes of X and of Y, and four values of C.
void sb_mma(sb_mma_kind kind, uint64_t x, uint64_t y, void* c, int line);
void sb_fail(const char* message, int line);

typedef void (*sb_body)(const void* kernel, void** arguments);
// Runs a grid; returns a description of the first fault, or null. ``writable`` tells which arguments are pointers that
// the kernel may write through.
const char* sb_run(sb_body body, const void* kernel, const unsigned* grid, const unsigned* block, unsigned shared,
                   void** arguments, const bool* writable, unsigned argument_count, int order, char* shared_start,
                   char* shared_end);
__attribute__((visibility("default"))) void sb_buffers(const sb_buffer* buffers, unsigned count);
}
