// RMSNorm of bf16 rows with fp32 weights on a GPU; see params.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace dsa::native {

/// Whether the kernels take these tensors; otherwise why_not says what is missing.
bool rms_norm_supports(const at::Tensor& x, const at::Tensor& weight_D, const char** why_not);
/// x [..., D] with rows of one stride -> (y like x, r fp32 [rows]).
std::pair<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight_D, double eps);
/// -> (dx like x, dw fp32 [D]); undefined where not wanted.
std::pair<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight_D,
                                                    const at::Tensor& r, bool want_x, bool want_w);

}  // namespace dsa::native
