// What a device kernel needs to know to select the k best scores of every row; no LibTorch, no CUDA header.
//
// Order: score descending, then index ascending; -0 equals +0; -inf is never selected; NaN is never selected
// and counted. Only start[t] <= s < end[t] is read; indices count from the row's first element, not from start.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace dsa {

struct TopKSelectParams {
  int64_t rows = 0;     ///< T
  int64_t columns = 0;  ///< S, at most 2^30
  int k = 0;            ///< 1 to 4096

  const float* logits = nullptr;   ///< [T,S]
  int64_t logits_stride = 0;       ///< elements from row to row
  const int32_t* start = nullptr;  ///< [T]; null: 0. Clamped to [0, S]
  const int32_t* end = nullptr;    ///< [T]; null: S. Clamped to [0, S]

  int32_t* indices = nullptr;     ///< [T,k], ascending, -1 after the last
  int64_t indices_stride = 0;     ///< elements from row to row
  float* scores = nullptr;        ///< [T,k] the logits of the indices; anything after the last; null: not wanted
  int64_t scores_stride = 0;      ///< elements from row to row
  int32_t* lengths = nullptr;     ///< [T], number of selected keys
  int32_t* nan_counts = nullptr;  ///< [T], NaNs met in the row's range; null: not reported

  CUstream_st* stream = nullptr;
};

/// Whether the Hopper kernel takes this input on the current device; otherwise *why_not says what is missing.
bool sm90_supports(const TopKSelectParams& p, const char** why_not);

/// Enqueues the kernel: one read of the logits, no scratch in device memory. Throws std::runtime_error when
/// sm90_supports refuses or CUDA reports an error. The result is the same set in the same order on every run.
void launch_topk_select_sm90(const TopKSelectParams& p);

}  // namespace dsa
