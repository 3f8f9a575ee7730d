// Dense attention's backward pass on a GPU, the same bits on every run; see params.h.
#pragma once

#include "kernels/dense_mla/reference.h"

namespace dsa::native {

/// Whether the kernels serve these tensors; otherwise why_not says what is missing.
bool dense_mla_supports(const at::Tensor& q_THD, const at::Tensor& v_SHV, const char** why_not);
/// Contract of reference::dense_mla_backward.
reference::DenseMlaGradients dense_mla_backward(const at::Tensor& do_THV, const at::Tensor& q_THD, const at::Tensor& k_SHD,
                                                const at::Tensor& v_SHV, const at::Tensor& start_T, const at::Tensor& end_T,
                                                const at::Tensor& o_THV, const at::Tensor& lse_TH, double scale);

}  // namespace dsa::native
