#include "data/fp8_block.h"

#include <algorithm>
#include <cmath>

#include "data/error.h"
#include "data/float_formats.h"

namespace dsa {

float ue8m0_scale(float amax) {
  int exponent;
  const float mantissa = std::frexp(std::max(amax, 1e-4f), &exponent);  // in [0.5, 1)
  // 448 = 0.875 * 2^9, hence amax / 448 = (mantissa / 0.875) * 2^(exponent - 9).
  return std::ldexp(1.0f, exponent - 9 + (mantissa > 0.875f ? 1 : 0));
}

void fp8_dequantize(const uint8_t* codes, int64_t rows, int64_t cols, int64_t row0, int64_t col0,
                    const float* scales, int64_t scale_stride, float* out) {
  const float* table = e4m3_table();
  const int64_t first_block_row = row0 / kFp8Block;
  for (int64_t r = 0; r < rows; ++r) {
    const float* scale_row = scales + ((row0 + r) / kFp8Block - first_block_row) * scale_stride;
    const uint8_t* code = codes + r * cols;
    float* value = out + r * cols;
    for (int64_t c = 0; c < cols;) {
      const int64_t block = (col0 + c) / kFp8Block;
      const int64_t end = std::min(cols, (block + 1) * kFp8Block - col0);
      for (const float scale = scale_row[block]; c < end; ++c) value[c] = table[code[c]] * scale;
    }
  }
}

void fp8_quantize(const float* weights, int64_t rows, int64_t cols, uint8_t* codes, float* scales) {
  const int64_t block_cols = fp8_blocks(cols);
  for (int64_t r0 = 0; r0 < rows; r0 += kFp8Block) {
    for (int64_t c0 = 0; c0 < cols; c0 += kFp8Block) {
      const int64_t r1 = std::min(rows, r0 + kFp8Block), c1 = std::min(cols, c0 + kFp8Block);
      int32_t largest = 0;  // magnitudes compare like their bits, and NaN above all
      for (int64_t r = r0; r < r1; ++r) {
        const float* from = weights + r * cols;
        for (int64_t c = c0; c < c1; ++c)
          largest = std::max(largest, static_cast<int32_t>(float_to_bits(from[c]) & 0x7fffffffu));
      }
      if (largest >= 0x7f800000)
        throw InputError("cannot quantise a weight to FP8", "it is NaN or infinite",
                         "the model has diverged; export an earlier checkpoint");
      const float scale = ue8m0_scale(bits_to_float(static_cast<uint32_t>(largest)));
      const float inverse = 1.0f / scale;  // exact: a power of two
      scales[r0 / kFp8Block * block_cols + c0 / kFp8Block] = scale;
      for (int64_t r = r0; r < r1; ++r) {
        const float* __restrict from = weights + r * cols;  // restrict: bytes may alias anything
        uint8_t* __restrict to = codes + r * cols;
        for (int64_t c = c0; c < c1; ++c) to[c] = float_to_e4m3(from[c] * inverse);
      }
    }
  }
}

}  // namespace dsa
