// Dense attention's forward pass by cuDNN through LibTorch, for bf16 on a GPU. Contract of reference::dense_mla_forward.
//
// cuDNN's causal mask is top-left (row i sees keys 0..i). Rows are therefore taken as runs: consecutive rows that
// start at one key and end one key later each. A run whose first row sees F + 1 keys is a full part over the first F
// keys and a causal square over the rest. The two are merged by their log-sum-exp,
//   lse = log(exp(lse1) + exp(lse2)),   o = o1 exp(lse1 - lse) + o2 exp(lse2 - lse).
//
// Its backward pass is not used: it adds up dq in any order, and of long sequences every run would have other bits.
#pragma once

#include "kernels/dense_mla/reference.h"

namespace dsa::cudnn {

DenseMlaOutput dense_mla_forward(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& v_SHV,
                                 const at::Tensor& start_T, const at::Tensor& end_T, double scale);

}  // namespace dsa::cudnn
