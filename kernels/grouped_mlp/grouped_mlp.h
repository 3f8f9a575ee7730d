// The SwiGLU feed-forward network, alone and for tokens grouped by expert.
//
//   y = W_down( silu(W_gate x) * W_up x )        the product in fp32 for bf16, rounded once
//
// Letters: N or M token rows, H hidden, I intermediate, E local experts. Weights are [out, in].
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

/// x [..., H], w_gate_IH, w_up_IH, w_down_HI of one dtype -> [..., H]. Differentiable.
at::Tensor swiglu_mlp(const at::Tensor& x, const at::Tensor& w_gate_IH, const at::Tensor& w_up_IH,
                      const at::Tensor& w_down_HI);

/// What goes into W_down: silu(W_gate x) * W_up x. x_NH, w_gate_IH, w_up_IH of one dtype -> [N,I]. Differentiable.
at::Tensor swiglu_hidden(const at::Tensor& x_NH, const at::Tensor& w_gate_IH, const at::Tensor& w_up_IH);

/// x_MH: rows sorted by expert, rows_per_expert[e] of them each (they sum to M) -> [M,H]. Differentiable in x and
/// the weights; an expert without rows gets a zero gradient.
at::Tensor grouped_swiglu(const at::Tensor& x_MH, at::IntArrayRef rows_per_expert, const at::Tensor& gate_EIH,
                          const at::Tensor& up_EIH, const at::Tensor& down_EHI);

}  // namespace dsa
