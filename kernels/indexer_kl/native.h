// The indexer's loss and its gradients by the Hopper kernels, all rows in one call and nothing of size rows x keys outside a
// bounded workspace. Formulas in indexer_kl.h and indexer_logits.h; the kernels' contracts in *params.h.
//
// Letters: T query rows, S keys, H attention heads, D = 192, J indexer heads, I = 128, K selected keys.
#pragma once

#include "kernels/indexer_logits/indexer_logits.h"
#include "kernels/topk_select/topk_select.h"

namespace dsa::native {

struct IndexerLoss {
  at::Tensor kl_T, entropy_T;  ///< nats, neither weighted nor scaled; the entropy of softmax(I)
  at::Tensor recall_T;         ///< share of the target's mass in the indexer's top-k; dense only
  IndexerGradients gradients;  ///< of sum_t weight[t] scale KL[t]; dq is bf16; undefined unless wanted
};

/// The inputs of the indexer: q_TJI, k_SI bf16, w_TJ fp32.
struct IndexerInputs {
  at::Tensor q_TJI, k_SI, w_TJ;
};

/// Target: mean over the H heads of q_THD (all of the model) of exp(scale q.k - lse), over start <= s < end. The last 64
/// columns of k_SHD, the rotated key, are the same for all heads (only head 0's are read).
bool indexer_kl_dense_supports(const at::Tensor& q_THD, const IndexerInputs& indexer, const char** why_not);
IndexerLoss indexer_kl_dense(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& lse_TH, double scale,
                             const IndexerInputs& indexer, const at::Tensor& start_T, const at::Tensor& end_T, int64_t top_k,
                             const at::Tensor& row_weight_T, double loss_scale, bool want_gradient);

/// Target: p_TK over the selected keys, summing to 1. Scores: selected.scores_TK, as the selection computed them. Where a
/// contribution to dk is infinite or NaN, dk is NaN throughout. site: a layer (quantum.h).
bool indexer_kl_sparse_supports(const IndexerInputs& indexer, const TopK& selected, const char** why_not);
IndexerLoss indexer_kl_sparse(const at::Tensor& p_TK, const TopK& selected, const IndexerInputs& indexer,
                              const at::Tensor& row_weight_T, double loss_scale, int64_t site);

}  // namespace dsa::native
