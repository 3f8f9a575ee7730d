// What the device kernels need to know to attend to selected keys in latent form; no LibTorch, no CUDA header.
//
//   s[t,h,i] = scale * q[t,h] . kv[idx[t,i]]     lse[t,h] = log sum_i exp(s)     p = exp(s - lse)
//   o[t,h] = sum_i p[t,h,i] kv[idx[t,i], :512]
//   ds = scale * p * (do[t,h] . kv[idx[t,i], :512] - delta[t,h])      delta[t,h] = o[t,h] . do[t,h]
//   dq[t,h] = sum_i ds kv[idx[t,i]]     dkv[idx[t,i]] += sum_h ds q[t,h] + [p do[t,h] ; 0]     p_sel[t,i] = mean_h p
//
// Letters: T query rows, S keys, H heads, K list entries, E = 576 = 512 latent + 64 rope. q, kv, o, do, dq are bf16,
// the sums fp32. An entry i of a list counts when i < lengths[t], 0 <= idx < S and idx is greater than the entry before
// it: a key twice in a list counts once, nothing out of range is read. Of lists whose counting entries do not ascend
// the backward pass for 32 heads or fewer gives no particular numbers.
//
// The backward pass of one layer over several blocks of query rows (and any number of calls) sums into one dkv_sum:
//   1. Clear dkv_sum, sparse_mla_sum_bytes(S) bytes; choose a quantum (QuantumGuess of kernels/quantum.h does).
//   2. For every block: launch_sparse_mla_delta_sm90, launch_sparse_mla_backward_sm90, all with that quantum. dq and
//      p_sel of the block are final. The blocks may come in any order and size.
//   3. launch_sparse_mla_finish_sm90 once: dkv, and a report on the sums.
//   4. If the report's difference is 0 and its greatest magnitude at most QuantumGuess::kMostQuanta, dkv is right and
//      has the same bits in every run. Otherwise redo 1 to 3 with a coarser quantum. (QuantumGuess makes the choice a
//      function of the inputs alone.)
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace dsa {

struct QuantumReport;  // kernels/quantum.h

struct SparseMlaParams {
  int64_t queries = 0;  ///< T
  int64_t keys = 0;     ///< S, at most 2^30
  int heads = 0;        ///< H, 1 to 128
  int k = 0;            ///< K, a multiple of 64, at most 4096
  float scale = 1;

  const void* q = nullptr;   ///< [T,H,576], heads contiguous; rows 16-byte aligned
  int64_t q_stride = 0;      ///< elements from query to query
  const void* kv = nullptr;  ///< [S,576]
  int64_t kv_stride = 0;     ///< elements from key to key
  const int32_t* indices = nullptr;  ///< [T,K], ascending, anything after a row's length
  int64_t indices_stride = 0;        ///< elements from row to row
  const int32_t* lengths = nullptr;  ///< [T]; null: K. Clamped to [0, K]

  CUstream_st* stream = nullptr;
};

struct SparseMlaForwardParams : SparseMlaParams {
  void* o = nullptr;              ///< [T,H,512] contiguous, 16-byte aligned; 0 for rows without a key
  float* lse = nullptr;           ///< [T,H] contiguous, natural logarithm; -inf for rows without a key
  /// One counter, grows by the entries before a row's length that do not count; null: none.
  uint32_t* bad_entries = nullptr;
};

struct SparseMlaBackwardParams : SparseMlaParams {
  const void* d_o = nullptr;      ///< [T,H,512], heads contiguous; rows 16-byte aligned
  int64_t d_o_stride = 0;         ///< elements from query to query
  const float* lse = nullptr;     ///< [T,H] contiguous, of the forward pass
  const float* delta = nullptr;   ///< [T,H] contiguous, see launch_sparse_mla_delta_sm90

  void* dq = nullptr;             ///< [T,H,576] contiguous, bf16; 16-byte aligned
  float* p_sel = nullptr;         ///< [T,K] contiguous; 0 where an entry does not count
  /// Sums that this call adds to: a checksum, then 192 words a key of three integers each, in an order of their own
  /// (kernels/cuda/packed_sums.cuh). 128-byte aligned, sparse_mla_sum_bytes(S) bytes or more.
  uint64_t* dkv_sum = nullptr;
  /// A power of two. Every contribution to dkv_sum is rounded to a multiple of it, which makes the sums independent of
  /// their order as long as none passes 2^20 quanta.
  float quantum = 0;
  /// Of how many keys the sums (1536 bytes each) stay in the L2 cache. Where the lists of a call's last 1024 queries
  /// name more, contributions (of a list to a key, over all heads) are also rounded to bf16, written to the workspace
  /// and summed by key, instead of being added to memory one by one.
  int cached_keys = 49152;

  /// 16-byte aligned; at least sparse_mla_workspace_bytes(p, 1), best for 512 rows and more.
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

/// Whether the Hopper kernels take this input on the current device; otherwise *why_not says what is missing.
bool sm90_supports(const SparseMlaParams& p, const char** why_not);

/// Enqueues the forward kernel. Throws std::runtime_error when sm90_supports refuses or CUDA reports an error.
void launch_sparse_mla_forward_sm90(const SparseMlaForwardParams& p);

/// delta[t,h] = sum_c o[t,h,c] do[t,h,c], fp32, [T,H] contiguous; o contiguous.
void launch_sparse_mla_delta_sm90(const SparseMlaBackwardParams& p, const void* o, float* delta);

/// Bytes of workspace for `rows` query rows at a time (at most 1024 lists of 64 or more heads): P and dS twice, one
/// half is read while the other is filled, and with more than cached_keys keys the contributions.
size_t sparse_mla_workspace_bytes(const SparseMlaBackwardParams& p, int64_t rows);

/// Enqueues the backward kernels: dq, p_sel, and the sums added to dkv_sum. Throws like the forward launch.
/// dq, p_sel and dkv_sum have the same bits on every run.
void launch_sparse_mla_backward_sm90(const SparseMlaBackwardParams& p);

/// Bytes of dkv_sum.
int64_t sparse_mla_sum_bytes(int64_t keys);

/// Writes dkv [S,576] contiguous, bf16 or fp32, from finished sums, and what they say of the quantum (one report on the
/// device). quantum: of the calls before.
void launch_sparse_mla_finish_sm90(const uint64_t* dkv_sum, int64_t keys, float quantum, void* dkv, bool bf16,
                                   QuantumReport* report, CUstream_st* stream);

}  // namespace dsa
