// What the device kernels of dense attention's backward pass need to know; no LibTorch, no CUDA header.
//
//   P[t,s]  = exp(scale q_t . k_s - lse_t)   for start_t <= s < end_t, else 0        (each head by itself)
//   dS[t,s] = P[t,s] (do_t . v_s - delta_t),   delta_t = do_t . o_t
//   dq_t = scale sum_s dS[t,s] k_s      dk_s = scale sum_t dS[t,s] q_t      dv_s = sum_t P[t,s] do_t
//
// fp32 inside; P and dS are rounded to bf16 on their way to the products. Every sum has one fixed order: repeats are equal
// bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace dsa {

/// bf16 [rows, heads, columns], columns contiguous, 16-byte aligned; strides in elements, multiples of 8.
struct DenseMlaOperand {
  const void* data = nullptr;
  int64_t stride = 0, head_stride = 0;
};

struct DenseMlaBackwardParams {
  int64_t queries = 0, keys = 0;
  int heads = 0;
  float scale = 1;
  DenseMlaOperand q, k;                            ///< [T,H,192], [S,H,192]
  DenseMlaOperand v, o, d_o;                       ///< [S,H,128], [T,H,128], [T,H,128]
  const float* lse = nullptr;                      ///< [T,H] contiguous, natural log; of no effect where a row has no key
  const int32_t *start = nullptr, *end = nullptr;  ///< [T], 0 <= start, end <= S; no key where start >= end

  void *dq = nullptr, *dk = nullptr, *dv = nullptr;  ///< bf16, contiguous, 4-byte aligned; written whole

  void* workspace = nullptr;                       ///< dense_mla_workspace_bytes(), 16-byte aligned
  size_t workspace_bytes = 0;
  CUstream_st* stream = nullptr;
};

/// 8 bytes a row and head, 16 for every 64 rows.
size_t dense_mla_workspace_bytes(int64_t queries, int heads);

/// Whether the kernels serve p on the current device; otherwise why_not says what is missing. Pointers are not read.
bool sm90_supports(const DenseMlaBackwardParams& p, const char** why_not);

/// Enqueues the kernels. Throws std::runtime_error where p is not supported or CUDA reports an error.
void launch_dense_mla_backward_sm90(const DenseMlaBackwardParams& p);

}  // namespace dsa
