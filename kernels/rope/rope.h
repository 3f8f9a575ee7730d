// Rotary position embedding with YaRN frequencies (DeepSeek-V3 section 4.3, YaRN arXiv 2309.00071).
//
//   f_i = theta^(-2i/R), i < R/2
//   YaRN:  c(r) = R ln(original / (2 pi r)) / (2 ln theta); low = floor(c(beta_fast)), high = ceil(c(beta_slow))
//          g_i = clamp((i - low) / (high - low), 0, 1);  f'_i = f_i / factor * g_i + f_i * (1 - g_i)
//   pair (a, b) at position p -> (a cos(p f') - b sin(p f'),  b cos(p f') + a sin(p f'))
//
// cos and sin carry no mscale: the whole YaRN temperature sits in the attention scale.
// Letters: T rows, R rope dim, R2 = R/2.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

struct RopeParameters {
  double theta = 10000;
  double factor = 40;
  double original_max_position = 4096;
  double beta_fast = 32;
  double beta_slow = 1;
  bool yarn = true;
  int64_t dim = 64;
};

enum class RopeLayout {
  INTERLEAVED,  ///< pairs (x0,x1), (x2,x3), ...: the main attention; written back interleaved
  HALF,         ///< pairs (x_i, x_{i+R/2}): the indexer
};

struct RopeTable {
  at::Tensor cos_TR2, sin_TR2;
};

/// Frequencies f' [R/2]: fp64 for at::kDouble, otherwise computed in fp32 as the released weights expect.
at::Tensor rope_frequencies(const RopeParameters& parameters, at::ScalarType dtype);

/// positions_T: int64 [T], absolute. dtype fp64: angles in double, table fp64. fp32 or bf16: angle = the float32
/// product of position and frequency (what the released weights were trained with), table fp32.
RopeTable rope_table(const at::Tensor& positions_T, const RopeParameters& parameters, at::ScalarType dtype);

/// x [T, ..., R] fp32, fp64 or bf16 -> same shape and dtype, rotated in the table's precision, rounded once.
/// Differentiable in x (the inverse rotation).
at::Tensor apply_rope(const at::Tensor& x, const RopeTable& table, RopeLayout layout);

/// The same into y, which shares no memory with x; not differentiable. inverse: by the opposite angle, as a backward pass does.
void rope_into(const at::Tensor& y, const at::Tensor& x, const RopeTable& table, RopeLayout layout, bool inverse);

}  // namespace dsa
