// What the device code needs to know to train the indexer in the dense warm-up: scores, loss and all gradients of a stretch
// of query rows in one call with bounded workspace; no LibTorch, no CUDA header. The [T,S] scores and their gradient exist
// for one block of rows at a time:
//
//   logits (kernels/indexer_logits) -> selection for the recall (kernels/topk_select) -> loss and dI (params.h)
//   -> dq, dw, dk (kernels/indexer_backward)
//
// Scores may be e4m3 while the gradient's q and k are the bf16 tensors that were quantised: the gradient passes straight
// through the quantiser, and dI is that of the scores used.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/indexer_backward/params.h"
#include "kernels/indexer_kl/params.h"
#include "kernels/indexer_logits/params.h"

namespace dsa {

struct IndexerKlDenseParams {
  AttentionMassParams attention;   ///< all but the workspace; its queries, keys, ranges and stream are those of the call
  const float* mass = nullptr;     ///< [T,S] of all heads, 8-byte aligned: the target in place of attention's q, k, lse
  int64_t mass_stride = 0;         ///< even
  IndexerLogitsParams scores;      ///< dtype, heads, dim, q, k, w, k_scale and their strides
  IndexerBackwardParams gradient;  ///< heads, dim, q, k, w and their strides, dq, dw, dk; dq null: the loss alone
  DenseKlRows rows;                ///< all_heads, row_weight, loss_scale and the values of a row
  int top_k = 0;                   ///< of the recall, 1 to 4096; 0: none

  void* workspace = nullptr;   ///< device memory, 256-byte aligned
  size_t workspace_bytes = 0;  ///< at least indexer_kl_dense_workspace_bytes(p, 256); blocks are as large as it allows
};

/// Bytes of workspace for blocks of this many rows: 4 bytes a score, whose place its gradient takes, and, a row, 16 for every
/// 256 keys, 4 top_k and less than 32; 8 bytes for every 256 x 256 scores; and what the gradient's kernels ask for.
size_t indexer_kl_dense_workspace_bytes(const IndexerKlDenseParams& p, int64_t rows);

/// Whether the Hopper kernels take this input on the current device; otherwise *why_not says what is missing.
bool sm90_supports(const IndexerKlDenseParams& p, const char** why_not);

/// Enqueues the work on attention.stream. dk grows by this call's share, everything else is overwritten. Throws
/// std::runtime_error when sm90_supports refuses or CUDA reports an error. Same input, same workspace size: same bits.
void launch_indexer_kl_dense_sm90(const IndexerKlDenseParams& p);

}  // namespace dsa
