// Halves of CUDA as those of the compiler.
#pragma once
#include <stdint.h>
#include <string.h>

typedef _Float16 half;
inline half __ushort_as_half(uint16_t bits) {
  half value;
  memcpy(&value, &bits, 2);
  return value;
}
inline float __half2float(half value) { return float(value); }
inline half __float2half(float value) { return half(value); }
