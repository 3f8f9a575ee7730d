// What a device kernel needs to know to rotate pairs of bf16 channels; no LibTorch, no CUDA header.
//
//   (a, b) -> (a cos - b sin,  b cos + a sin)     of row t, every head: pairs (x_2i, x_2i+1), or (x_i, x_i+R/2) in halves
//
// fp32 inside, rounded once.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace dsa {

struct RopeParams {
  int64_t rows = 0;               ///< T
  int64_t heads = 0;              ///< H
  int dim = 0;                    ///< R, a multiple of 16
  bool halves = false;            ///< which channels form a pair
  bool inverse = false;           ///< by the opposite angle: what a backward pass does
  const void* x = nullptr;        ///< [T,H,R] bf16, 16-byte aligned, strides multiples of 8
  int64_t x_row = 0, x_head = 0;  ///< elements from row to row, from head to head
  void* y = nullptr;              ///< [T,H,R] bf16, likewise
  int64_t y_row = 0, y_head = 0;
  const float* cos = nullptr;     ///< [T,R/2] contiguous, 16-byte aligned
  const float* sin = nullptr;
  CUstream_st* stream = nullptr;
};

/// Whether the kernel takes this input; otherwise *why_not says what is missing.
bool rope_supports(const RopeParams& p, const char** why_not);
/// Enqueues the kernel. Throws std::runtime_error when CUDA reports an error.
void launch_rope(const RopeParams& p);

}  // namespace dsa
