// RMSNorm and LayerNorm over the last dim.
//
//   rms_norm:   y = w * x * rsqrt(mean(x^2) + eps)
//   layer_norm: y = w * (x - mean(x)) * rsqrt(var(x) + eps) + b
//
// Statistics, normalisation and the product with w in fp32 (fp64 for fp64 x); the result is rounded once to x's
// dtype. Weights may be x's dtype or fp32; their gradient has their own dtype.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

/// x [..., D], weight_D [D] -> [..., D] of x's dtype. Differentiable; keeps x and one number a row.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight_D, double eps);

/// x [..., D], weight_D, bias_D [D] -> [..., D] of x's dtype. Differentiable.
at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight_D, const at::Tensor& bias_D, double eps);

}  // namespace dsa
