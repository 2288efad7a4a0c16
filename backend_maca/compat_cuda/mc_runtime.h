// Stands in for the header of the MACA SDK where nvcc compiles. A wave of 64 lanes is a pair of warps that meet at a
// barrier and exchange values through shared memory. Compile with -fmad=false.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

namespace sb {

constexpr int kMaxWaves = 16;

// A vector of clang's, without its operators: generated code uses elements only.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
  __host__ __device__ T& operator[](int i) { return element[i]; }
  __host__ __device__ const T& operator[](int i) const { return element[i]; }
};
typedef Vector<int, 4> I32x4;
typedef Vector<float, 4> F32x4;
typedef Vector<double, 4> F64x4;

__device__ __forceinline__ int thread_in_block() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
__device__ __forceinline__ int lane() { return thread_in_block() & 63; }

// How often each warp of the 16th wave has come to its barrier.
__device__ __forceinline__ volatile unsigned* comings() {
  __shared__ unsigned counts[2];
  return counts;
}

// A block of 16 waves begins with this.
__device__ __forceinline__ void sixteen_waves() {
  if (thread_in_block() < 2) comings()[thread_in_block()] = 0;
  __syncthreads();
}

// Barrier 0 of the hardware is that of __syncthreads, 15 are left. Lanes may come one by one: those of a warp need not
// have met before.
__device__ __forceinline__ void wave_barrier() {
  const int thread = thread_in_block(), wave = thread >> 6;
  if (wave < 15) return __barrier_sync_count(wave + 1, 64);
  __threadfence_block();
  __syncwarp();
  if ((thread & 31) == 0) {
    const int warp = thread >> 5 & 1;
    const unsigned mine = comings()[warp] + 1;
    comings()[warp] = mine;
    while ((int)(comings()[1 - warp] - mine) < 0) continue;  // the other warp may be one ahead
  }
  __syncwarp();
  __threadfence_block();
}

// Eight bytes for each lane of the wave.
__device__ __forceinline__ unsigned long long* scratch() {
  __shared__ unsigned long long slots[kMaxWaves][64];
  return slots[thread_in_block() >> 6];
}

template <class T>
__device__ __forceinline__ unsigned long long to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a lane exchanges at most 8 bytes");
  unsigned long long bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
__device__ __forceinline__ T shuffle_xor(unsigned long long, T value, int distance, int = 64) {
  static_assert(sizeof(T) == 4, "a lane shuffles 4 bytes");
  if (distance < 32) return __shfl_xor_sync(0xffffffffu, value, distance);
  unsigned long long* slots = scratch();
  slots[lane()] = to_bits(value);
  wave_barrier();
  const unsigned bits = (unsigned)slots[lane() ^ distance];
  wave_barrier();
  T other;
  memcpy(&other, &bits, 4);
  return other;
}

__device__ __forceinline__ unsigned long long ballot(unsigned long long, int predicate) {
  unsigned long long* slots = scratch();
  const unsigned half = __ballot_sync(0xffffffffu, predicate);
  if ((lane() & 31) == 0) slots[lane() >> 5] = half;
  wave_barrier();
  const unsigned long long votes = slots[0] | slots[1] << 32;
  wave_barrier();
  return votes;
}

struct ByI8 {
  static constexpr int bytes = 4;
  static __device__ int add(unsigned long long x, unsigned long long y, int sum) {
    return __dp4a((int)x, (int)y, sum);
  }
};
// Adds the products of ``held`` floats of each side, in order.
template <class By, class T>
__device__ __forceinline__ T add_products(unsigned long long x, unsigned long long y, T sum) {
  for (int k = 0; k < By::held; ++k) sum += By::element(x, k) * By::element(y, k);
  return sum;
}
struct ByF16 {
  static constexpr int held = 4, bytes = 8;
  static __device__ float element(unsigned long long bits, int k) {
    return __half2float(__ushort_as_half((unsigned short)(bits >> (16 * k))));
  }
  static __device__ float add(unsigned long long x, unsigned long long y, float sum) {
    return add_products<ByF16>(x, y, sum);
  }
};
struct ByBF16 {
  static constexpr int held = 4, bytes = 8;
  static __device__ float element(unsigned long long bits, int k) {
    return __uint_as_float((unsigned)(bits >> (16 * k)) << 16);
  }
  static __device__ float add(unsigned long long x, unsigned long long y, float sum) {
    return add_products<ByBF16>(x, y, sum);
  }
};
struct ByTF32 {
  static constexpr int held = 2, bytes = 8;
  static __device__ float element(unsigned long long bits, int k) {
    return __uint_as_float((unsigned)(bits >> (32 * k)) & 0xffffe000u);
  }
  static __device__ float add(unsigned long long x, unsigned long long y, float sum) {
    return add_products<ByTF32>(x, y, sum);
  }
};
struct ByF32 {
  static constexpr int bytes = 4;
  static __device__ float add(unsigned long long x, unsigned long long y, float sum) {
    return sum + __uint_as_float((unsigned)x) * __uint_as_float((unsigned)y);
  }
};
struct ByF64 {
  static constexpr int bytes = 8;
  static __device__ double add(unsigned long long x, unsigned long long y, double sum) {
    return sum + __longlong_as_double(x) * __longlong_as_double(y);
  }
};

// D = X Y^T + C; see the emulator for who holds what. A call, so that kernels with many stay small.
template <class By, class V, class C>
__device__ __noinline__ C multiply(V x, V y, C c) {
  static_assert(sizeof(V) == By::bytes, "a lane's part of X and Y has another size");
  unsigned long long* slots = scratch();
  unsigned long long columns[4];
  slots[lane()] = to_bits(y);
  wave_barrier();
  for (int quarter = 0; quarter < 4; ++quarter) columns[quarter] = slots[16 * quarter + lane() % 16];
  wave_barrier();
  slots[lane()] = to_bits(x);
  wave_barrier();
  for (int quarter = 0; quarter < 4; ++quarter)
    for (int v = 0; v < 4; ++v) {
      const unsigned long long row = slots[16 * quarter + 4 * (lane() / 16) + v];
      c[v] = By::add(row, columns[quarter], c[v]);
    }
  wave_barrier();
  return c;
}

__device__ __forceinline__ I32x4 mma_i8(int x, int y, I32x4 c) { return multiply<ByI8>(x, y, c); }
template <class V>
__device__ __forceinline__ F32x4 mma_f16(V x, V y, F32x4 c) {
  return multiply<ByF16>(x, y, c);
}
template <class V>
__device__ __forceinline__ F32x4 mma_bf16(V x, V y, F32x4 c) {
  return multiply<ByBF16>(x, y, c);
}
__device__ __forceinline__ F32x4 mma_tf32(Vector<float, 2> x, Vector<float, 2> y, F32x4 c) {
  return multiply<ByTF32>(x, y, c);
}
__device__ __forceinline__ F32x4 mma_f32(float x, float y, F32x4 c) { return multiply<ByF32>(x, y, c); }
__device__ __forceinline__ F64x4 mma_f64(double x, double y, F64x4 c) { return multiply<ByF64>(x, y, c); }

}  // namespace sb

#define __NATIVE_VECTOR__(count, type) sb::Vector<type, count>
#define __shfl_xor_sync sb::shuffle_xor
#define __ballot_sync sb::ballot
#define __syncwarp(mask) sb::wave_barrier()
#define SB_SIXTEEN_WAVES() sb::sixteen_waves()
#define __lane_id sb::lane
#define __builtin_mxc_mma_16x16x16i8 sb::mma_i8
#define __builtin_mxc_mma_16x16x16f16 sb::mma_f16
#define __builtin_mxc_mma_16x16x16bf16 sb::mma_bf16
#define __builtin_mxc_mma_16x16x8tf32 sb::mma_tf32
#define __builtin_mxc_mma_16x16x4f32 sb::mma_f32
#define __builtin_mxc_mma_16x16x4f64 sb::mma_f64
