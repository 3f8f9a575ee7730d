// What the device kernels need to know for the indexer's loss over selected keys and its gradients; no LibTorch, no
// CUDA header.
//
//   pi[t] = softmax(I[t])                                       I[t,i] given, of key idx[t,i]
//   kl[t] = sum_i p (log p - log pi)                            0 log 0 = 0
//   dI = row_weight[t] loss_scale (pi - p)                      0 for rows with one key or none
//   m[t,j,i] = dI 1[q[t,j] . k[idx[t,i]] > 0]
//   dq[t,j] = w[t,j] sum_i m k[idx[t,i]]    dw[t,j] = q[t,j] . sum_i m k[idx[t,i]]
//   dk[idx[t,i]] += sum_j m w[t,j] q[t,j]
//
// Letters: T query rows, S keys, J heads, K list entries. q, k are bf16. I is what selected the keys, in whatever
// precision (topk_select/params.h hands it on): sum_j w[t,j] max(0, q[t,j] . k) of q and k, or of e4m3 codes of them.
// The loss is that of these scores; the gradient takes the signs, q and k in bf16, as if the quantiser were not there:
// straight through. m w is rounded to bf16 once, m is taken as two bf16: dk errs by 1e-3 to 2e-3, dq and dw by about
// 1e-5. An entry i of a list counts when i < lengths[t], 0 <= idx < S and idx is greater than the entry before it; p and
// I of the others are not used.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/quantum.h"

struct CUstream_st;

namespace dsa {

struct IndexerKlSparseParams {
  int64_t queries = 0;  ///< T
  int64_t keys = 0;     ///< S, at most 2^30
  int heads = 0;        ///< J, 1 to 64; a multiprocessor works for 64
  int dim = 128;        ///< D, 128
  int k = 0;            ///< K, a multiple of 64, at most 4096

  const void* q = nullptr;       ///< [T,J,128] bf16, heads contiguous; rows 16-byte aligned
  int64_t q_stride = 0;          ///< elements from query to query
  const void* key = nullptr;     ///< k [S,128] bf16
  int64_t k_stride = 0;          ///< elements from key to key
  const float* w = nullptr;      ///< [T,J], all constant factors of the scores included
  int64_t w_stride = 0;          ///< elements from query to query
  const int32_t* indices = nullptr;  ///< [T,K], ascending, anything after a row's length
  int64_t indices_stride = 0;        ///< elements from row to row
  const int32_t* lengths = nullptr;  ///< [T]; null: K. Clamped to [0, K]
  const float* scores = nullptr;     ///< I [T,K]
  int64_t scores_stride = 0;         ///< elements from row to row
  const float* p_sel = nullptr;      ///< p [T,K], sums to 1 over the entries that count
  int64_t p_stride = 0;              ///< elements from row to row

  float loss_scale = 1;
  const float* row_weight = nullptr;  ///< [T]; null: 1

  float* kl = nullptr;                  ///< [T] nats, without weight and scale; null: not wanted
  float* entropy_target = nullptr;      ///< [T] -sum p log p; null: not wanted
  float* entropy_prediction = nullptr;  ///< [T] entropy of pi; null: not wanted
  void* dq = nullptr;      ///< [T,J,128] contiguous, bf16 or fp32; 16-byte aligned
  bool dq_bf16 = true;
  float* dw = nullptr;     ///< [T,J] contiguous
  /// Sums that this call adds to, indexer_kl_sparse_sum_bytes(S), 128-byte aligned; clear: all bytes zero. Integers
  /// packed three to a word and a checksum (kernels/cuda/packed_sums.cuh): the same bits in any order of calls and rows.
  uint64_t* dk_sum = nullptr;
  float quantum = 0;  ///< every contribution to dk_sum is rounded to a multiple of this power of two

  void* workspace = nullptr;  ///< 16-byte aligned, at least indexer_kl_sparse_workspace_bytes()
  size_t workspace_bytes = 0;

  CUstream_st* stream = nullptr;
};

/// Whether the Hopper kernel takes this input on the current device; otherwise *why_not says what is missing.
bool sm90_supports(const IndexerKlSparseParams& p, const char** why_not);

/// Bytes that a launch needs beside its inputs and outputs: counters and what order lists are taken in.
size_t indexer_kl_sparse_workspace_bytes();

/// Bytes of dk_sum for S keys: 384 a key and a checksum.
int64_t indexer_kl_sparse_sum_bytes(int64_t keys);

/// Enqueues the kernel. Throws std::runtime_error when sm90_supports refuses or CUDA reports an error.
/// All outputs have the same bits on every run. The last bits of dq and dw depend on a row's place in the call and on the
/// number of multiprocessors; dk's do not.
void launch_indexer_kl_sparse_sm90(const IndexerKlSparseParams& p);

/// Writes dk [S,128] contiguous, bf16 or fp32, from finished sums, and a report of them to the device: they hold if it
/// says no difference and at most QuantumGuess::kMostQuanta; otherwise do the pass again with another quantum.
void launch_indexer_kl_sparse_finish_sm90(const uint64_t* dk_sum, int64_t keys, float quantum, void* dk, bool bf16,
                                          QuantumReport* report, CUstream_st* stream);

}  // namespace dsa
