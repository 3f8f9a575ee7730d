// What the device kernels need to know to attend to selected keys in latent form; no LibTorch, no CUDA header.
//
//   s[t,h,i] = scale * q[t,h] . kv[idx[t,i]]     lse[t,h] = log sum_i exp(s)     p = exp(s - lse)
//   o[t,h] = sum_i p[t,h,i] kv[idx[t,i], :512]
//   ds = scale * p * (do[t,h] . kv[idx[t,i], :512] - delta[t,h])      delta[t,h] = o[t,h] . do[t,h]
//   dq[t,h] = sum_i ds kv[idx[t,i]]     dkv[idx[t,i]] += sum_h ds q[t,h] + [p do[t,h] ; 0]     p_sel[t,i] = mean_h p
//
// Letters: T query rows, S keys, H heads, K list entries, E = 576 = 512 latent + 64 rope. q, kv, o, do, dq are bf16, the
// sums fp32. An entry i of a list counts when i < lengths[t], 0 <= idx < S and idx is greater than the entry before it:
// a key twice in a list counts once, nothing out of range is read.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace dsa {

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
  void* o = nullptr;              ///< [T,H,512] contiguous; 0 for rows without a key
  float* lse = nullptr;           ///< [T,H] contiguous, natural logarithm; -inf for rows without a key
  uint32_t* bad_entries = nullptr;  ///< one counter, grows by the entries before a row's length that do not count; null: none
};

/// Whether the Hopper kernels take this input on the current device; otherwise *why_not says what is missing.
bool sm90_supports(const SparseMlaParams& p, const char** why_not);

/// Enqueues the forward kernel. Throws std::runtime_error when sm90_supports refuses or CUDA reports an error.
void launch_sparse_mla_forward_sm90(const SparseMlaForwardParams& p);

}  // namespace dsa
