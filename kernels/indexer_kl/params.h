// What the device kernels need to know to compute the indexer's loss of the dense warm-up; no LibTorch, no CUDA header.
//
//   mass[t,s] = sum_h exp(scale q[t,h] . [k[s,h] ; k_rope[s]] - lse[t,h])       p = mass / all_heads
//   KL[t] = sum_s p (log p - log softmax(I)[s])    dI[t,s] = loss_scale row_weight[t] (softmax(I)[s] - p[t,s])
//
// Sums run over start[t] <= s < end[t]. 0 log 0 = 0; a row of one key has p = 1, KL 0 and dI 0, a row of none all zeros.
// Letters: T query rows, S keys, H heads of this rank, J indexer heads, K selected keys. q and k are bf16 in MHA form: 128
// columns of a head's own and 64 rope columns, whose keys all heads share (with k stored as [S,H,192], k_rope = k + 128 and
// k_rope_stride = k_stride). Everything is repeatable bit by bit: no sum's order depends on the launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/indexer_logits/params.h"

struct CUstream_st;

namespace dsa {

/// A block of query rows of the attention whose mass is the target.
struct AttentionMassParams {
  int64_t queries = 0;  ///< T
  int64_t keys = 0;     ///< S, at most 2^30
  int heads = 0;        ///< H
  float scale = 1;      ///< of the scores

  const void* q = nullptr;  ///< [T,H,192], 16-byte aligned; all strides in elements and multiples of 8
  int64_t q_stride = 0, q_head_stride = 0;
  const void* k = nullptr;  ///< [S,H,128], the columns that differ between heads
  int64_t k_stride = 0, k_head_stride = 0;
  const void* k_rope = nullptr;  ///< [S,64]
  int64_t k_rope_stride = 0;
  const float* lse = nullptr;  ///< [T,H] natural logarithm, of the forward pass; strides as in its layout
  int64_t lse_stride = 0, lse_head_stride = 0;
  const int32_t* start = nullptr;  ///< [T], first key of a row; null: 0. Clamped to [0, S]
  const int32_t* end = nullptr;    ///< [T], one past the last key; null: S. Clamped to [0, S]

  void* workspace = nullptr;  ///< device memory, 256-byte aligned, dense_kl_workspace_bytes; contents of no meaning
  size_t workspace_bytes = 0;
  CUstream_st* stream = nullptr;
};

/// What the loss needs beside the mass, and what comes out.
struct DenseKlRows {
  int all_heads = 0;                 ///< heads that the mass sums over, of all ranks
  const float* logits = nullptr;     ///< I [T,S]; only what lies in a row's range counts. 16-byte aligned, stride a multiple of 4
  int64_t logits_stride = 0;
  const int32_t* selected = nullptr; ///< [T,K] keys of the k best scores as topk_select writes them; null: no recall
  int64_t selected_stride = 0;
  const int32_t* selected_lengths = nullptr;  ///< [T]
  const float* row_weight = nullptr; ///< [T]; null: 1. A row of weight 0 still reports its loss
  float loss_scale = 1;

  float* kl = nullptr;                  ///< [T] nats, neither weighted nor scaled
  float* entropy_target = nullptr;      ///< [T] -sum p log p
  float* entropy_prediction = nullptr;  ///< [T] of softmax(I)
  float* recall = nullptr;              ///< [T] sum of p over the selected keys, 0 without them
  float* dI = nullptr;                  ///< [T,S] 8-byte aligned; may be logits; outside a row's range zeros or untouched; null: none
  int64_t dI_stride = 0;                ///< even, at least S
};

/// Bytes of workspace of the three launches below.
size_t dense_kl_workspace_bytes(int64_t queries, int64_t keys);

/// Whether the Hopper kernels take this input on the current device; otherwise *why_not says what is missing.
bool sm90_supports(const AttentionMassParams& p, const char** why_not);

/// The loss of rows whose heads are all here: one pass over the heads, the mass never leaves the registers. The launches
/// throw std::runtime_error when the input is not supported or CUDA reports an error.
void launch_dense_kl_sm90(const AttentionMassParams& p, const DenseKlRows& rows);

/// The mass alone, fp32 [T,S] (8-byte aligned, even stride), inside each row's range: what tensor-parallel ranks add up.
void launch_attention_mass_sm90(const AttentionMassParams& p, float* mass, int64_t mass_stride);

/// The loss from a mass summed over all heads. p: queries, keys, start, end, workspace and stream alone are read.
void launch_dense_kl_of_mass_sm90(const AttentionMassParams& p, const float* mass, int64_t mass_stride, const DenseKlRows& rows);

}  // namespace dsa
