// E4M3 quantisation of activation vectors (DeepSeek inference/kernel.py, act_quant).
//
//   amax = max(max|x|, 1e-4) over a group of contiguous elements of the last dim
//   POWER_OF_TWO: scale = 2^ceil(log2(amax / 448));  PLAIN: scale = amax / 448
//   code = e4m3fn(clamp(x / scale, -448, 448)), round to nearest even;  x ~ code * scale
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

enum class ScaleFormat { POWER_OF_TWO, PLAIN };

struct Fp8Tensor {
  at::Tensor codes;  ///< Float8_e4m3fn, shape of x (view it as uint8 for the bytes)
  at::Tensor scale;  ///< fp32 [..., D / group], a multiplier
};

/// amax fp32 [...] -> scale fp32 [...]; exact powers of two for POWER_OF_TWO.
at::Tensor fp8_scale(const at::Tensor& amax, ScaleFormat format);

/// x [..., D] fp32, bf16 or fp64 (read as fp32); group divides D. Throws otherwise.
Fp8Tensor act_quant(const at::Tensor& x, ScaleFormat format = ScaleFormat::POWER_OF_TWO, int64_t group = 128);

/// codes * scale, fp32 [..., D].
at::Tensor act_dequant(const Fp8Tensor& quantised);

/// act_dequant(act_quant(x)) in x's dtype (exact in bf16 for POWER_OF_TWO); its gradient is the identity (straight through).
at::Tensor fake_quantise(const at::Tensor& x, ScaleFormat format = ScaleFormat::POWER_OF_TWO, int64_t group = 128);

}  // namespace dsa
