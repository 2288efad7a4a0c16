#pragma once
#include <stdint.h>
#include <string.h>

struct maca_bfloat16 {
  uint16_t bits;
};

static inline float __bfloat162float(maca_bfloat16 b) {
  const uint32_t bits = (uint32_t)b.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Rounds to nearest, ties to even.
static inline maca_bfloat16 __float2bfloat16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
