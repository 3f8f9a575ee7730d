#include "data/float_formats.h"

#include <array>
#include <cmath>
#include <limits>

namespace dsa {

float f16_to_float(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float value;
  if (exponent == 31)
    value = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  else
    value = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(static_cast<float>(mantissa), -24);
  return (h & 0x8000) ? -value : value;
}

const float* e4m3_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> t{};
    for (int code = 0; code < 256; ++code) {
      const int exponent = (code >> 3) & 15, mantissa = code & 7;
      float value = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(static_cast<float>(mantissa), -9);
      if ((code & 127) == 127) value = std::numeric_limits<float>::quiet_NaN();
      t[static_cast<size_t>(code)] = (code & 128) ? -value : value;
    }
    return t;
  }();
  return table.data();
}

}  // namespace dsa
