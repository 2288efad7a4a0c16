#pragma once
#include <stdint.h>
#include <string.h>

struct half {
  uint16_t bits;
};

static inline float __half2float(half h) {
  const uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)mantissa * 0x1p-24f;
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// Rounds to nearest, ties to even.
static inline half __float2half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {(uint16_t)(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};
  if (magnitude < 0x38800000) {  // a subnormal: let the adder of float round it to a multiple of 2^-24
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    memcpy(&bits, &shifted, 4);
    return {(uint16_t)(sign | (bits - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {(uint16_t)(sign | (rounded - 0x38000000) >> 13)};
}
