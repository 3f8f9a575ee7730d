// bfloat16, float16 and E4M3 (fn: no infinity, codes 127 and 255 are NaN, largest 448) to and from float32.
// Rounding is to nearest, ties to even; E4M3 saturates at +-448. Checked against torch's casts (tests/golden).
#pragma once

#include <cstdint>
#include <cstring>

namespace dsa {

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float bf16_to_float(uint16_t b) { return bits_to_float(static_cast<uint32_t>(b) << 16); }

inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);  // NaN stays NaN
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

float f16_to_float(uint16_t h);

const float* e4m3_table();  // [256]
inline float e4m3_to_float(uint8_t code) { return e4m3_table()[code]; }

inline uint8_t float_to_e4m3(float f) {  // selects, not branches: loops over it become vector code
  const uint32_t u = float_to_bits(f), a = u & 0x7fffffffu;
  // Normal: keep 3 bits of mantissa, move the bias from 127 to 7.
  const uint32_t normal = ((a + 0x7ffffu + ((a >> 20) & 1u)) >> 20) - (120u << 3);
  // Below 2^-6, steps of 2^-9: adding 2^14 leaves exactly those steps in the mantissa.
  const uint32_t tiny = float_to_bits(bits_to_float(a) + 16384.0f) - 0x46800000u;
  uint32_t code = a < 0x3c800000u ? tiny : normal;
  code = a >= 0x43e00000u ? 0x7eu : code;  // |f| >= 448
  code = a > 0x7f800000u ? 0x7fu : code;   // NaN
  return static_cast<uint8_t>(((u >> 24) & 0x80u) | code);
}

}  // namespace dsa
