// What the device code needs to know to score and select a block of query rows in one call with bounded workspace;
// no LibTorch, no CUDA header. The scores are those of kernels/indexer_logits, the order that of
// kernels/topk_select; the [T,S] scores never exist whole.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/indexer_logits/params.h"

namespace dsa {

struct IndexerTopKParams {
  IndexerLogitsParams scores;  ///< logits, logits_stride and fill_outside are ignored
  int k = 0;                   ///< 1 to 4096

  int32_t* indices = nullptr;     ///< [T,k], ascending, -1 after the last
  int64_t indices_stride = 0;     ///< elements from row to row
  float* selected_scores = nullptr;     ///< [T,k] the scores of the indices; anything after the last; null: not wanted
  int64_t selected_scores_stride = 0;   ///< elements from row to row
  int32_t* lengths = nullptr;     ///< [T], number of selected keys
  int32_t* nan_counts = nullptr;  ///< [T], NaN scores met in a row; null: not reported

  void* workspace = nullptr;   ///< device memory, 256-byte aligned
  size_t workspace_bytes = 0;  ///< at least indexer_topk_workspace_sm90(...).least
};

struct IndexerTopKWorkspace {
  size_t least;   ///< bytes without which nothing runs
  size_t enough;  ///< bytes beyond which nothing gets faster
};

IndexerTopKWorkspace indexer_topk_workspace_sm90(int64_t queries, int64_t keys);

/// Whether the Hopper kernels take this input on the current device; otherwise *why_not says what is missing.
bool sm90_supports(const IndexerTopKParams& p, const char** why_not);

/// Enqueues the work on scores.stream. Throws std::runtime_error when sm90_supports refuses or CUDA reports an error.
void launch_indexer_topk_sm90(const IndexerTopKParams& p);

}  // namespace dsa
