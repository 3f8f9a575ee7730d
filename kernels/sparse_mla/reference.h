// Products with the listed keys for a few rows at a time; any device. Same contract as sparse_mla.h, without autograd.
#pragma once

#include "kernels/sparse_mla/sparse_mla.h"

namespace dsa::reference {

struct SparseMlaGradients {
  at::Tensor dq_THE, dkv_SE;  ///< dtypes of q and kv
  at::Tensor mass_TK;         ///< as in SparseMlaOutput
};

SparseMlaOutput sparse_mla_forward(const at::Tensor& q_THE, const at::Tensor& kv_SE, const at::Tensor& indices_TK,
                                   const at::Tensor& lengths_T, double scale, int64_t latent, int64_t query_block,
                                   bool want_mass);
SparseMlaGradients sparse_mla_backward(const at::Tensor& do_THC, const at::Tensor& q_THE, const at::Tensor& kv_SE,
                                       const at::Tensor& indices_TK, const at::Tensor& lengths_T,
                                       const at::Tensor& o_THC, const at::Tensor& lse_TH, double scale, int64_t latent,
                                       int64_t query_block);

}  // namespace dsa::reference
