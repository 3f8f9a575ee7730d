// The Hopper kernels behind tensors. Same contract as sparse_mla.h, without autograd; params.h has the kernels' own.
#pragma once

#include "kernels/sparse_mla/reference.h"

namespace dsa::native {

/// Whether the kernels take these tensors; otherwise why_not says what is missing.
bool sparse_mla_supports(const at::Tensor& q_THE, const at::Tensor& kv_SE, const at::Tensor& indices_TK, int64_t latent,
                         const char** why_not);

/// Without the mass: the backward pass has it.
SparseMlaOutput sparse_mla_forward(const at::Tensor& q_THE, const at::Tensor& kv_SE, const at::Tensor& indices_TK,
                                   const at::Tensor& lengths_T, double scale);

/// The sum over heads of the probabilities comes with the gradients. Synchronises with the device: the quantum of the
/// sums into dkv is checked, and the pass is run again with another one when it does not fit;
/// `site` says whose last one is tried first (quantum.h).
reference::SparseMlaGradients sparse_mla_backward(const at::Tensor& do_THC, const at::Tensor& q_THE, const at::Tensor& kv_SE,
                                                  const at::Tensor& indices_TK, const at::Tensor& lengths_T,
                                                  const at::Tensor& o_THC, const at::Tensor& lse_TH, double scale, int64_t site);

}  // namespace dsa::native
