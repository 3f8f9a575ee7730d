// The lightning indexer's scores (DeepSeek-V3.2-Exp paper, eq. 1) and their gradients.
//
//   I[t,s] = sum_j w[t,j] * max(0, q[t,j] . k[s])       start[t] <= s < end[t], else -inf
//   g[t,j,s] = dI[t,s] * w[t,j] * 1[q[t,j].k[s] > 0]
//   dq[t,j] = sum_s g k[s]    dk[s] = sum_{t,j} g q[t,j]    dw[t,j] = sum_s dI[t,s] max(0, q[t,j].k[s])
//
// w already holds both constants (heads^-1/2 and dim^-1/2). The ReLU comes before w, which may be negative.
// Letters: T query rows, S keys, J indexer heads, D indexer head dim, K selected keys.
// q, k, w: fp32, fp64 or bf16; w may be fp32 beside bf16 q and k. Results are fp32 (fp64 for fp64).
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

struct IndexerGradients {
  at::Tensor dq_TJD, dk_SD, dw_TJ;  ///< fp32 (fp64 for fp64)
};

/// -> [T,S]. start_T, end_T int32/int64 [T]. No autograd: the gradient is given in closed form below.
at::Tensor indexer_logits(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ,
                          const at::Tensor& start_T, const at::Tensor& end_T);

/// dI_TS is read only inside each row's range.
IndexerGradients indexer_logits_backward(const at::Tensor& dI_TS, const at::Tensor& q_TJD, const at::Tensor& k_SD,
                                         const at::Tensor& w_TJ, const at::Tensor& start_T,
                                         const at::Tensor& end_T);

/// The same scores for the selected keys alone: indices_TK int32/int64, -1 = none -> [T,K], -inf where none.
at::Tensor indexer_logits_selected(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ,
                                   const at::Tensor& indices_TK);

/// dI_TK is ignored where the index is -1.
IndexerGradients indexer_logits_selected_backward(const at::Tensor& dI_TK, const at::Tensor& q_TJD,
                                                  const at::Tensor& k_SD, const at::Tensor& w_TJ,
                                                  const at::Tensor& indices_TK);

}  // namespace dsa
