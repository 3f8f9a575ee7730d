// What a device kernel needs to know to compute the lightning indexer's scores; no LibTorch, no CUDA header.
//
//   logits[t,s] = k_scale[s] * sum_j w[t,j] * max(0, q[t,j] . k[s])      start[t] <= s < end[t]
//
// q and k are e4m3 or bf16; the dot products and the sum accumulate in fp32. Of the sum of 32 products of e4m3 the tensor core
// keeps about 14 bits; rows of fewer than 1024 keys, where that shows, are multiplied as fp16, which holds e4m3 exactly: a
// row's own length decides. With e4m3, the scale of q[t,j] is multiplied into w[t,j] by the caller (exact for powers of two)
// and that of k[s] is k_scale[s]. NaN: a NaN in w, k_scale or in bf16 q or k makes the score NaN; NaN codes of e4m3 may count
// as 0 (their scale says it).
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace dsa {

enum class IndexerDtype { E4M3, BF16 };

struct IndexerLogitsParams {
  IndexerDtype dtype = IndexerDtype::BF16;
  int64_t queries = 0;  ///< T
  int64_t keys = 0;     ///< S, at most 2^30
  int heads = 0;        ///< J, 1 to 64
  int dim = 0;          ///< D, at most 128

  const void* q = nullptr;         ///< [T,J,D], heads contiguous; 16-byte aligned rows
  int64_t q_stride = 0;            ///< elements from query to query
  const void* k = nullptr;         ///< [S,D]
  int64_t k_stride = 0;            ///< elements from key to key
  const float* w = nullptr;        ///< [T,J]
  int64_t w_stride = 0;            ///< elements from query to query
  const float* k_scale = nullptr;  ///< [S]; null: 1
  const int32_t* start = nullptr;  ///< [T], first key of a row; null: 0. Clamped to [0, S]
  const int32_t* end = nullptr;    ///< [T], one past the last key; null: S. Clamped to [0, S]

  float* logits = nullptr;     ///< [T,S] fp32
  int64_t logits_stride = 0;   ///< elements from row to row
  bool fill_outside = false;   ///< true: -inf outside a row's range; false: those places are left untouched

  CUstream_st* stream = nullptr;
};

/// Whether the Hopper kernel takes this input on the current device; otherwise *why_not says what is missing.
bool sm90_supports(const IndexerLogitsParams& p, const char** why_not);

/// Enqueues the kernel. Throws std::runtime_error when sm90_supports refuses or CUDA reports an error.
/// Deterministic: every logit is one fixed sum, whatever the launch shape or the neighbours.
void launch_indexer_logits_sm90(const IndexerLogitsParams& p);

}  // namespace dsa
