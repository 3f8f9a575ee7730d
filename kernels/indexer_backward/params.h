// What the device kernels need to know to send the gradient of the indexer's scores to its inputs; no LibTorch, no CUDA header.
//
//   I[t,s] = sum_j w[t,j] max(0, q[t,j] . k[s])            start[t] <= s < end[t]      (indexer_logits/params.h)
//   m[t,j,s] = dI[t,s] 1[q[t,j] . k[s] > 0]
//   dq[t,j] = w[t,j] sum_s m k[s]      dw[t,j] = sum_s m q[t,j] . k[s]      dk[s] += sum_t sum_j m w[t,j] q[t,j]
//
// q and k are bf16, dI is fp32, products of bf16 and sums in fp32: m and m w are rounded to bf16 once each, but m of rows
// 2i and 2i + 1 is taken as two bf16 where both together reach over few keys (256 from a multiple of 128 on). With FP8
// scores in the forward pass, q and k are the bf16 tensors that were quantised: the quantiser passes the gradient
// straight through, and the scales belong to the scores, not to w.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace dsa {

struct IndexerBackwardParams {
  int64_t queries = 0;  ///< T, at most 2^30
  int64_t keys = 0;     ///< S, at most 2^30
  int heads = 0;        ///< J, 1 to 64; a multiprocessor works for 64
  int dim = 128;        ///< D, 128

  const void* q = nullptr;         ///< [T,J,128] bf16, heads contiguous; rows 16-byte aligned
  int64_t q_stride = 0;            ///< elements from query to query
  const void* k = nullptr;         ///< [S,128] bf16
  int64_t k_stride = 0;            ///< elements from key to key
  const float* w = nullptr;        ///< [T,J], all constant factors of the scores included
  int64_t w_stride = 0;            ///< elements from query to query
  const int32_t* start = nullptr;  ///< [T], first key of a row; null: 0. Clamped to [0, S]
  const int32_t* end = nullptr;    ///< [T], one past the last key; null: S. Clamped to [0, S]

  const float* d_logits = nullptr;  ///< dI [T,S] fp32, loss scale and row weights included; anything outside a row's range
  int64_t d_logits_stride = 0;     ///< elements from row to row, a multiple of 4; base 16-byte aligned

  void* dq = nullptr;     ///< [T,J,128] contiguous, bf16 or fp32; 16-byte aligned
  bool dq_bf16 = true;
  float* dw = nullptr;    ///< [T,J] contiguous
  float* dk = nullptr;    ///< [S,128] contiguous, this call adds to it; 16-byte aligned

  void* workspace = nullptr;  ///< 16-byte aligned, at least indexer_backward_workspace_bytes(p)
  size_t workspace_bytes = 0;

  CUstream_st* stream = nullptr;
};

/// Whether the Hopper kernels take this input on the current device; otherwise *why_not says what is missing.
bool sm90_supports(const IndexerBackwardParams& p, const char** why_not);

/// Bytes that a launch needs beside its inputs and outputs on the current device: 8 for every key (rounded up to 256) and row
/// of those worked on at a time, up to half a GiB but no less than for four rows a multiprocessor, and 34.6 MB on 132 of them.
size_t indexer_backward_workspace_bytes(const IndexerBackwardParams& p);

/// Enqueues the kernels. Throws std::runtime_error when sm90_supports refuses or CUDA reports an error.
/// The same bits on every run on devices of as many multiprocessors: every sum has one order.
void launch_indexer_backward_sm90(const IndexerBackwardParams& p);

}  // namespace dsa
