// FP8 weights in blocks of 128 x 128:  W[r][c] = e4m3(code[r][c]) * scale[r / 128][c / 128], float32 product.
// Quantising:  amax = max |W| of the block (edge blocks are smaller),  scale = 2^ceil(log2(max(amax, 1e-4) / 448)),
// code = e4m3(W / scale). Scales on output are powers of two; on input any float32.
#pragma once

#include <cstdint>

namespace dsa {

constexpr int64_t kFp8Block = 128;
inline int64_t fp8_blocks(int64_t n) { return (n + kFp8Block - 1) / kFp8Block; }

float ue8m0_scale(float amax);  // exact: no logarithm is rounded

// A slice [rows, cols] whose first element is [row0, col0] of its tensor. `scales` is the tensor's grid from
// block row row0 / 128 on, scale_stride columns wide. codes and out are dense [rows, cols].
void fp8_dequantize(const uint8_t* codes, int64_t rows, int64_t cols, int64_t row0, int64_t col0,
                    const float* scales, int64_t scale_stride, float* out);

// weights [rows, cols] -> codes [rows, cols], scales [ceil(rows/128), ceil(cols/128)].
// Throws InputError when a weight is not finite.
void fp8_quantize(const float* weights, int64_t rows, int64_t cols, uint8_t* codes, float* scales);

}  // namespace dsa
