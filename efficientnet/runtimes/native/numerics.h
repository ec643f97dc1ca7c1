// The arithmetic of docs/native.md, one value at a time. Included by files that are compiled for different instruction sets, so
// everything is static: the linker must not merge what differs.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace native {

static inline int32_t clamp_to(int32_t value, int32_t low, int32_t high) {
  return value < low ? low : value > high ? high : value;
}
static inline int32_t sat16(int32_t value) { return clamp_to(value, -32768, 32767); }
static inline uint8_t sat8(int32_t value) { return uint8_t(clamp_to(value, 0, 255)); }
static inline int32_t mulhrs(int32_t a, int32_t b) { return (a * b + 16384) >> 15; }
static inline int32_t adds(int32_t a, int32_t b) { return sat16(a + b); }

// To nearest even; what is outside of +-2^30 comes out at that, NaN as 0.
static inline int32_t rint32(float value) {
  if (!(value > -1073741824.0f)) return value < 0 ? -1073741824 : 0;
  if (value > 1073741824.0f) return 1073741824;
  return int32_t(__builtin_rintf(value));
}

static inline float from_bf16(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}
static inline uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float sigmoid(float x) {
  float t = x * -1.44269502f;
  t = t > -120.0f ? t : -120.0f;
  t = t < 120.0f ? t : 120.0f;
  const float n = __builtin_rintf(t), f = t - n;
  float p = 0.000154035304f * f + 0.00133335581f;
  p = p * f + 0.00961812911f;
  p = p * f + 0.0555041087f;
  p = p * f + 0.240226507f;
  p = p * f + 0.693147182f;
  p = p * f + 1.0f;
  uint32_t bits;
  memcpy(&bits, &p, 4);
  bits += uint32_t(int32_t(n)) << 23;
  memcpy(&p, &bits, 4);
  return 1.0f / (1.0f + p);
}
static inline float silu(float x) { return x * sigmoid(x); }

// Sixteen sums side by side, then halves onto halves: an order that vectors of every width can keep.
static inline float dot16(const uint16_t* weights, const float* values, int count) {
  float sums[16] = {};
  for (int i = 0; i < count; i += 16)
    for (int l = 0; l < 16 && i + l < count; l++) sums[l] += from_bf16(weights[i + l]) * values[i + l];
  for (int half = 8; half; half /= 2)
    for (int l = 0; l < half; l++) sums[l] += sums[l + half];
  return sums[0];
}

// The piecewise linear activation of 16 bits.
static inline int32_t by_table(int32_t x, const int16_t* table) {
  const int i = (x >> 10) & 63;
  return adds(mulhrs(x, table[i]), table[64 + i]);
}

}  // namespace native
