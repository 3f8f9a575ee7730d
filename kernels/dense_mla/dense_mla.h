// Dense causal attention in MHA form (MLA after its up-projections).
//
//   s[t,h,u] = scale * q[t,h] . k[u,h]     start[t] <= u < end[t]
//   lse[t,h] = log sum_u exp(s)            o[t,h] = sum_u exp(s - lse) v[u,h]
//   backward: p = exp(s - lse), D = o . do;  dv = p^T do;  ds = p * (do.v - D);  dq = scale ds k;  dk = scale ds^T q
//
// Letters: T query rows, S keys, H heads, D query/key dim (nope + rope), V value dim.
// q, k, v: fp32, fp64 or bf16 (fp32 softmax and sums). Rows without keys: o = 0, lse = -inf.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

struct DenseMlaOutput {
  at::Tensor o_THV;   ///< dtype of q
  at::Tensor lse_TH;  ///< natural log, fp32 (fp64 for fp64), without gradient
};

/// q_THD, k_SHD, v_SHV; start_T, end_T int32/int64 [T]; query_block: rows of a score tile. Differentiable in q, k
/// and v; keeps only q, k, v, o and lse and recomputes the tiles in the backward pass. `known`: the result of the same
/// call made before without gradients; it is then taken instead of computed.
/// bf16 on a GPU with D = 192 and V = 128: cuDNN forward (cudnn.h), our kernels backward (native.h), the same bits on every
/// run; else the reference.
DenseMlaOutput dense_mla(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& v_SHV,
                         const at::Tensor& start_T, const at::Tensor& end_T, double scale,
                         int64_t query_block = 128, const DenseMlaOutput* known = nullptr);

/// p[t,u] = sum over the heads of exp(scale q[t,h].k[u,h] - lse[t,h]), 0 outside the range: the indexer's
/// target before division by the number of heads. -> [T,S] fp32 (fp64 for fp64). Call it for a block of rows.
at::Tensor attention_mass(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& lse_TH,
                          const at::Tensor& start_T, const at::Tensor& end_T, double scale);

}  // namespace dsa
