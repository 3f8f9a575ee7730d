// The indexer's loss for a block of rows and its gradient (DeepSeek-V3.2-Exp paper, eq. 3 and 4).
//
//   L[t] = KL(p[t] || softmax(I[t])) = sum_s p log p - sum_s p I + logsumexp(I)      dL/dI = softmax(I) - p
//
// Sums run over the support: the entries with I > -inf. 0 log 0 = 0. A row with one key, or none, gives 0.
// Letters: T rows, X keys of the row (all S of them, or the K selected ones).
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/topk_select/topk_select.h"

namespace dsa {

struct KlRows {
  at::Tensor rows_T;                ///< KL of every row, nats
  at::Tensor entropy_target_T;      ///< -sum p log p
  at::Tensor entropy_prediction_T;  ///< entropy of softmax(I)
  at::Tensor gradient_TX;           ///< softmax(I) - p, 0 off the support; undefined unless want_gradient
};

/// scores_TX, target_TX: fp32 or fp64, same shape; every target row with keys sums to 1 over the support.
KlRows indexer_kl(const at::Tensor& scores_TX, const at::Tensor& target_TX, bool want_gradient);

/// Recall of the attention mass: sum of target_TS over each row's selected keys -> [T].
at::Tensor captured_mass(const at::Tensor& target_TS, const TopK& selected);

}  // namespace dsa
