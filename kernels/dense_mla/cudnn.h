// Dense attention by cuDNN through LibTorch, for bf16 on a GPU. Same contract as dense_mla.h, without autograd.
//
// cuDNN's causal mask is top-left (row i sees keys 0..i). Rows are therefore taken as runs: consecutive rows that
// start at one key and end one key later each. A run whose first row sees F + 1 keys is a full part over the first F
// keys and a causal square over the rest. The two are merged by their log-sum-exp,
//   lse = log(exp(lse1) + exp(lse2)),   o = o1 exp(lse1 - lse) + o2 exp(lse2 - lse),
// and each part's backward pass is given the merged o and lse, which makes its p the merged softmax.
#pragma once

#include "kernels/dense_mla/reference.h"

namespace dsa::cudnn {

/// Whether cuDNN takes these tensors; otherwise why_not says what is missing.
bool supports(const at::Tensor& q_THD, const at::Tensor& v_SHV, const char** why_not);

DenseMlaOutput dense_mla_forward(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& v_SHV,
                                 const at::Tensor& start_T, const at::Tensor& end_T, double scale);
reference::DenseMlaGradients dense_mla_backward(const at::Tensor& do_THV, const at::Tensor& q_THD, const at::Tensor& k_SHD,
                                                const at::Tensor& v_SHV, const at::Tensor& start_T,
                                                const at::Tensor& end_T, const at::Tensor& o_THV,
                                                const at::Tensor& lse_TH, double scale);

}  // namespace dsa::cudnn
