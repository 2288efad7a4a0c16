// Stands in for the header of the MACA SDK where clang compiles for AMD GPUs of 64-lane waves, the closest public
// relatives of MetaX's: same waves, same layout of matrix instructions. Compile with
//   clang++ -x hip --offload-device-only --offload-arch=gfx90a -nogpuinc -nogpulib -ffp-contract=off
// It shows that a compiler of this kind accepts the kernels, and what they take of registers and shared memory. There is
// no library of mathematics: exp and its kin are the fast instructions, tanh and its kin short formulas of them.
#pragma once
#include <stdint.h>

#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(threads) __attribute__((amdgpu_flat_work_group_size(threads, threads)))
#define __NATIVE_VECTOR__(count, type) type __attribute__((ext_vector_type(count)))
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define warpSize 64

namespace sb {

struct Index {
  unsigned x, y, z;
};
__device__ __forceinline__ Index thread_index() {
  return {__builtin_amdgcn_workitem_id_x(), __builtin_amdgcn_workitem_id_y(), __builtin_amdgcn_workitem_id_z()};
}
__device__ __forceinline__ Index block_index() {
  return {__builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y(), __builtin_amdgcn_workgroup_id_z()};
}
__device__ __forceinline__ unsigned lane() { return __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)); }

template <class To, class From>
__device__ __forceinline__ To cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

typedef __NATIVE_VECTOR__(4, float) F32x4;
typedef __NATIVE_VECTOR__(4, int) I32x4;
typedef __NATIVE_VECTOR__(4, _Float16) F16x4;
typedef __NATIVE_VECTOR__(4, short) I16x4;
typedef __NATIVE_VECTOR__(4, double) F64x4;

__device__ __forceinline__ I32x4 mma_i8(int x, int y, I32x4 c) {
  return __builtin_amdgcn_mfma_i32_16x16x16i8(x, y, c, 0, 0, 0);
}
template <class V>
__device__ __forceinline__ F32x4 mma_f16(V x, V y, F32x4 c) {
  return __builtin_amdgcn_mfma_f32_16x16x16f16(cast<F16x4>(x), cast<F16x4>(y), c, 0, 0, 0);
}
template <class V>
__device__ __forceinline__ F32x4 mma_bf16(V x, V y, F32x4 c) {
  return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(cast<I16x4>(x), cast<I16x4>(y), c, 0, 0, 0);
}
__device__ __forceinline__ F32x4 mma_f32(float x, float y, F32x4 c) {
  return __builtin_amdgcn_mfma_f32_16x16x4f32(x, y, c, 0, 0, 0);
}
__device__ __forceinline__ F64x4 mma_f64(double x, double y, F64x4 c) {
  return __builtin_amdgcn_mfma_f64_16x16x4f64(x, y, c, 0, 0, 0);
}

}  // namespace sb

#define threadIdx (sb::thread_index())
#define blockIdx (sb::block_index())
#define __builtin_mxc_mma_16x16x16i8 sb::mma_i8
#define __builtin_mxc_mma_16x16x16f16 sb::mma_f16
#define __builtin_mxc_mma_16x16x16bf16 sb::mma_bf16
#define __builtin_mxc_mma_16x16x4f32 sb::mma_f32
#define __builtin_mxc_mma_16x16x4f64 sb::mma_f64

__device__ __forceinline__ int __lane_id() { return sb::lane(); }
__device__ __forceinline__ void __syncthreads() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
__device__ __forceinline__ void __syncwarp(unsigned long long) { __builtin_amdgcn_wave_barrier(); }
__device__ __forceinline__ unsigned long long __ballot_sync(unsigned long long, int predicate) {
  return __builtin_amdgcn_uicmp(predicate, 0, 33);  // not equal
}
__device__ __forceinline__ int __popc(unsigned bits) { return __builtin_popcount(bits); }
__device__ __forceinline__ int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
template <class T>
__device__ __forceinline__ T __shfl_xor_sync(unsigned long long, T value, int distance, int = 64) {
  return sb::cast<T>(__builtin_amdgcn_ds_bpermute((sb::lane() ^ distance) << 2, sb::cast<int>(value)));
}

// Mathematics.

#define SB_BUILTIN(name)                                                          \
  __device__ __forceinline__ float name##f(float x) { return __builtin_##name##f(x); } \
  __device__ __forceinline__ double name(double x) { return __builtin_##name(x); }
SB_BUILTIN(fabs)
SB_BUILTIN(ceil)
SB_BUILTIN(floor)
SB_BUILTIN(trunc)
SB_BUILTIN(round)
SB_BUILTIN(rint)
SB_BUILTIN(sqrt)
__device__ __forceinline__ float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
__device__ __forceinline__ double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
__device__ __forceinline__ float fmaxf(float x, float y) { return __builtin_fmaxf(x, y); }
__device__ __forceinline__ double fmax(double x, double y) { return __builtin_fmax(x, y); }
__device__ __forceinline__ float fminf(float x, float y) { return __builtin_fminf(x, y); }
__device__ __forceinline__ double fmin(double x, double y) { return __builtin_fmin(x, y); }
__device__ __forceinline__ float copysignf(float x, float y) { return __builtin_copysignf(x, y); }
__device__ __forceinline__ double copysign(double x, double y) { return __builtin_copysign(x, y); }
__device__ __forceinline__ bool signbit(float x) { return __builtin_signbitf(x); }
__device__ __forceinline__ float exp2f(float x) { return __builtin_exp2f(x); }
__device__ __forceinline__ float log2f(float x) { return __builtin_log2f(x); }
__device__ __forceinline__ float expf(float x) { return exp2f(x * 1.44269504f); }
__device__ __forceinline__ float logf(float x) { return log2f(x) * 0.693147181f; }
__device__ __forceinline__ float expm1f(float x) { return expf(x) - 1.0f; }
__device__ __forceinline__ float log1pf(float x) { return logf(1.0f + x); }
__device__ __forceinline__ float powf(float x, float y) { return exp2f(y * log2f(x)); }
__device__ __forceinline__ float sinf(float x) { return __builtin_amdgcn_sinf(x * 0.159154943f); }
__device__ __forceinline__ float cosf(float x) { return __builtin_amdgcn_cosf(x * 0.159154943f); }
__device__ __forceinline__ float tanhf(float x) { return 1.0f - 2.0f / (1.0f + expf(2.0f * x)); }
__device__ __forceinline__ float fmodf(float x, float y) { return x - truncf(x / y) * y; }
__device__ __forceinline__ float erff(float x) {
  const float t = 1.0f / (1.0f + 0.47047f * fabsf(x));  // Abramowitz and Stegun 7.1.25
  return copysignf(1.0f - t * (0.3480242f + t * (-0.0958798f + t * 0.7478556f)) * expf(-x * x), x);
}
__device__ __forceinline__ float erfcf(float x) { return 1.0f - erff(x); }
__device__ __forceinline__ float log10f(float x) { return log2f(x) * 0.301029996f; }
__device__ __forceinline__ float cbrtf(float x) { return copysignf(exp2f(log2f(fabsf(x)) / 3.0f), x); }
__device__ __forceinline__ float tanf(float x) { return sinf(x) / cosf(x); }
__device__ __forceinline__ float sinhf(float x) { return 0.5f * (expf(x) - expf(-x)); }
__device__ __forceinline__ float coshf(float x) { return 0.5f * (expf(x) + expf(-x)); }
__device__ __forceinline__ float asinhf(float x) { return logf(x + __builtin_sqrtf(x * x + 1.0f)); }
__device__ __forceinline__ float acoshf(float x) { return logf(x + __builtin_sqrtf(x * x - 1.0f)); }
__device__ __forceinline__ float atanhf(float x) { return 0.5f * logf((1.0f + x) / (1.0f - x)); }
__device__ __forceinline__ float atanf(float x) {
  const float y = fminf(fabsf(x), 1.0f / fabsf(x)), small = y / (1.0f + 0.28f * y * y);
  return copysignf(fabsf(x) > 1.0f ? 1.57079633f - small : small, x);
}
__device__ __forceinline__ float atan2f(float y, float x) {
  return x > 0.0f ? atanf(y / x) : copysignf(3.14159265f, y) + atanf(y / x);
}
__device__ __forceinline__ float asinf(float x) { return atan2f(x, __builtin_sqrtf(1.0f - x * x)); }
__device__ __forceinline__ float acosf(float x) { return 1.57079633f - asinf(x); }
// In double, what kernels rarely use goes through float.
#define SB_NARROW(name) \
  __device__ __forceinline__ double name(double x) { return name##f((float)x); }
SB_NARROW(exp)
SB_NARROW(exp2)
SB_NARROW(expm1)
SB_NARROW(log)
SB_NARROW(log1p)
SB_NARROW(log2)
SB_NARROW(sin)
SB_NARROW(cos)
SB_NARROW(tanh)
SB_NARROW(erf)
SB_NARROW(erfc)
SB_NARROW(log10)
SB_NARROW(cbrt)
SB_NARROW(tan)
SB_NARROW(sinh)
SB_NARROW(cosh)
SB_NARROW(asin)
SB_NARROW(acos)
SB_NARROW(atan)
SB_NARROW(asinh)
SB_NARROW(acosh)
SB_NARROW(atanh)
__device__ __forceinline__ double atan2(double y, double x) { return atan2f((float)y, (float)x); }
__device__ __forceinline__ double pow(double x, double y) { return powf((float)x, (float)y); }
__device__ __forceinline__ double fmod(double x, double y) { return x - trunc(x / y) * y; }
