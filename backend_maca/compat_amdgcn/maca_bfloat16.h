#pragma once
#include <stdint.h>

struct maca_bfloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float __bfloat162float(maca_bfloat16 b) { return sb::cast<float>((uint32_t)b.bits << 16); }

// Rounds to nearest, ties to even.
__device__ __forceinline__ maca_bfloat16 __float2bfloat16(float f) {
  const uint32_t bits = sb::cast<uint32_t>(f);
  return {(uint16_t)(f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
