// The Hopper kernels of score, select, and score + select behind tensors; params.h of each has the kernels' contracts.
#pragma once

#include "kernels/topk_select/topk_select.h"

namespace dsa::native {

/// Whether the kernels take these tensors; otherwise why_not says what is missing.
bool indexer_supports(const at::Tensor& q_TJD, const at::Tensor& k_SD, const char** why_not);
bool topk_supports(const at::Tensor& logits_TS, int64_t k, const char** why_not);

at::Tensor indexer_logits(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ,
                          const at::Tensor& start_T, const at::Tensor& end_T);
TopK topk_select(const at::Tensor& logits_TS, int64_t k);
/// Workspace: at most 1 GiB. Throws on a NaN score.
TopK indexer_topk(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ, const at::Tensor& start_T,
                  const at::Tensor& end_T, int64_t top_k, bool want_scores);

}  // namespace dsa::native
