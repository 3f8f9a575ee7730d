// Score tiles of query_block rows of one head; any device. Same contract as dense_mla.h, without autograd.
#pragma once

#include "kernels/dense_mla/dense_mla.h"

namespace dsa::reference {

struct DenseMlaGradients {
  at::Tensor dq_THD, dk_SHD, dv_SHV;  ///< dtypes of q, k and v
};

DenseMlaOutput dense_mla_forward(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& v_SHV,
                                 const at::Tensor& start_T, const at::Tensor& end_T, double scale, int64_t query_block);
DenseMlaGradients dense_mla_backward(const at::Tensor& do_THV, const at::Tensor& q_THD, const at::Tensor& k_SHD,
                                     const at::Tensor& v_SHV, const at::Tensor& start_T, const at::Tensor& end_T,
                                     const at::Tensor& o_THV, const at::Tensor& lse_TH, double scale,
                                     int64_t query_block);
at::Tensor attention_mass(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& lse_TH,
                          const at::Tensor& start_T, const at::Tensor& end_T, double scale);

}  // namespace dsa::reference
