#pragma once
typedef _Float16 half;

__device__ __forceinline__ float __half2float(half h) { return h; }
__device__ __forceinline__ half __float2half(float f) { return (half)f; }
