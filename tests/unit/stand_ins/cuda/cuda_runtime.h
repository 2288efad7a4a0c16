// The part of CUDA that compat_cuda/mc_runtime.h uses, on threads of the CPU: warps of 32 lanes, one block at a time.
#pragma once
#include <assert.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include <thread>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define __forceinline__ inline
#define __noinline__
#define SB_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(cuda::dynamic)

struct uint3 {
  unsigned x, y, z;
};
inline thread_local uint3 threadIdx;
inline uint3 blockIdx, blockDim, gridDim;

namespace cuda {
inline char dynamic[64 << 10];
inline pthread_barrier_t block, named[16], warp[32];
inline uint32_t lanes[32][32];
inline unsigned own_warp() { return threadIdx.x / 32; }

// What each lane of the warp shows.
template <class T>
const uint32_t* exchange(unsigned mask, T value) {
  assert(mask == 0xffffffffu && sizeof(T) == 4);
  memcpy(&lanes[own_warp()][threadIdx.x % 32], &value, 4);
  pthread_barrier_wait(&warp[own_warp()]);
  return lanes[own_warp()];
}

template <class... A, size_t... I>
void run(void (*kernel)(A...), unsigned threads, void** arguments, std::index_sequence<I...>) {
  blockDim = {threads, 1, 1};
  gridDim = {1, 1, 1};
  pthread_barrier_init(&block, nullptr, threads);
  for (auto& barrier : named) pthread_barrier_init(&barrier, nullptr, 64);
  for (auto& barrier : warp) pthread_barrier_init(&barrier, nullptr, 32);
  std::vector<std::thread> all;
  for (unsigned i = 0; i < threads; ++i)
    all.emplace_back([=] {
      threadIdx = {i, 0, 0};
      kernel(*static_cast<A*>(arguments[I])...);
    });
  for (auto& thread : all) thread.join();
}
template <class... A>
void launch(void (*kernel)(A...), unsigned threads, void** arguments) {
  run(kernel, threads, arguments, std::make_index_sequence<sizeof...(A)>{});
}
}  // namespace cuda

inline void __syncthreads() { pthread_barrier_wait(&cuda::block); }
inline void __barrier_sync_count(unsigned id, unsigned count) {
  assert(0 < id && id < 16 && count == 64);  // number 0 is that of __syncthreads
  pthread_barrier_wait(&cuda::named[id]);
}
inline void __syncwarp() { pthread_barrier_wait(&cuda::warp[cuda::own_warp()]); }
inline void __threadfence_block() { __sync_synchronize(); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  assert(0 < distance && distance < 32);
  const uint32_t bits = cuda::exchange(mask, value)[threadIdx.x % 32 ^ distance];
  pthread_barrier_wait(&cuda::warp[cuda::own_warp()]);
  memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint32_t* shown = cuda::exchange(mask, uint32_t(predicate != 0));
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= shown[lane] << lane;
  pthread_barrier_wait(&cuda::warp[cuda::own_warp()]);
  return votes;
}
inline int __dp4a(int x, int y, int sum) {
  for (int k = 0; k < 32; k += 8) sum += int(int8_t(x >> k)) * int(int8_t(y >> k));
  return sum;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline double __longlong_as_double(long long bits) {
  double value;
  memcpy(&value, &bits, 8);
  return value;
}
