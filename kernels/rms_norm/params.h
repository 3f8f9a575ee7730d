// What a device kernel needs to know for RMSNorm of bf16 rows; no LibTorch, no CUDA header. With n = x r:
//
//   r = rsqrt(mean(x^2) + eps)     y = bf16(n w)
//   g = dy w;  dx = bf16( r (g - n mean(g n)) );  dw = sum over rows of dy n
//
// fp32 inside, rounded once. dw is left as `parts` partial sums over fixed sets of rows: add them in order.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace dsa {

struct RmsNormParams {
  int64_t rows = 0;
  int dim = 0;                 ///< a multiple of 8, at most 8192
  const void* x = nullptr;     ///< bf16
  int64_t x_stride = 0;        ///< elements from row to row, a multiple of 8
  const float* w = nullptr;    ///< fp32 [dim]
  float eps = 0;
  float* r = nullptr;          ///< fp32 [rows], written by the forward launch, read by the backward one
  void* y = nullptr;           ///< bf16 [rows,dim] contiguous

  const void* dy = nullptr;    ///< bf16 [rows,dim] contiguous
  void* dx = nullptr;          ///< bf16 [rows,dim] contiguous; null: not wanted
  float* dw_parts = nullptr;   ///< fp32 [parts,dim]; null: not wanted
  int parts = 0;               ///< also the number of thread blocks of the backward launch

  CUstream_st* stream = nullptr;
};

/// Whether the kernel takes this input; otherwise *why_not says what is missing.
bool rms_norm_supports(const RmsNormParams& p, const char** why_not);
/// Enqueue the kernels. Throw std::runtime_error when CUDA reports an error.
void launch_rms_norm_forward(const RmsNormParams& p);
void launch_rms_norm_backward(const RmsNormParams& p);

}  // namespace dsa
