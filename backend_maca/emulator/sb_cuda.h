// The part of MACA that generated kernels use, in CUDA. A wave of 64 lanes is a pair of warps that meet at a named
// barrier and exchange values through shared memory; blocks hold up to eight waves. Compile with -fmad=false.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace sb {

__device__ __forceinline__ int thread_in_block() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

__device__ __forceinline__ void wave_barrier() {
  asm volatile("bar.sync %0, 64;" ::"r"((thread_in_block() >> 6) + 1) : "memory");
}

template <class T>
__device__ __forceinline__ T shuffle_xor(unsigned long long, T value, int distance, int) {
  static_assert(sizeof(T) == 4, "a lane shuffles 4 bytes");
  __shared__ T slots[8][64];
  T* wave = slots[thread_in_block() >> 6];
  const int lane = thread_in_block() & 63;
  wave[lane] = value;
  wave_barrier();
  const T other = wave[lane ^ distance];
  wave_barrier();
  return other;
}

}  // namespace sb

#define __shfl_xor_sync sb::shuffle_xor
