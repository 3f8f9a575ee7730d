// Blocked tensor operations, any device, fp32 and fp64 sums: the CPU implementation and the oracle. Same contracts
// as indexer_logits.h.
#pragma once

#include "kernels/indexer_logits/indexer_logits.h"

namespace dsa::reference {

at::Tensor indexer_logits(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ,
                          const at::Tensor& start_T, const at::Tensor& end_T);
IndexerGradients indexer_logits_backward(const at::Tensor& dI_TS, const at::Tensor& q_TJD, const at::Tensor& k_SD,
                                         const at::Tensor& w_TJ, const at::Tensor& start_T, const at::Tensor& end_T);
at::Tensor indexer_logits_selected(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ,
                                   const at::Tensor& indices_TK);
IndexerGradients indexer_logits_selected_backward(const at::Tensor& dI_TK, const at::Tensor& q_TJD,
                                                  const at::Tensor& k_SD, const at::Tensor& w_TJ,
                                                  const at::Tensor& indices_TK);

}  // namespace dsa::reference
