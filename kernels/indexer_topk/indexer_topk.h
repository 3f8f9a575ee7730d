// Score and select: topk_select(indexer_logits(q, k, w, start, end), top_k) without the [T,S] scores; they exist
// for one block of rows at a time.
#pragma once

#include "kernels/topk_select/topk_select.h"

namespace dsa {

/// Shapes as in indexer_logits. query_block: rows whose scores exist at once. Indices count from the stream's
/// first key. want_scores: with scores_TK.
TopK indexer_topk(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ, const at::Tensor& start_T,
                  const at::Tensor& end_T, int64_t top_k, int64_t query_block = 128, bool want_scores = false);

}  // namespace dsa
