// What a device kernel needs to know to rotate and quantise rows of 128 bf16 values; no LibTorch, no CUDA header.
//
//   y = bf16( (x H_128) * 128^-1/2 )          Sylvester order, fp32 inside, rounded once; left out: y = x
//   amax = max(max|y|, 1e-4);  scale = 2^ceil(log2(amax / 448)), or plain amax / 448
//   code = e4m3fn( clamp(y / scale, -448, 448) ), round to nearest even
//
// The fp32 sums are formed by the in-place butterfly with strides 1, 2, 4, ..., 64 ((a, b) -> (a + b, a - b)), then
// multiplied by fl(128^-1/2): that fixes every bit. A NaN or an infinity among y makes the scale NaN or infinite.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace dsa {

struct HadamardQuantiseParams {
  int64_t rows = 0;
  const void* x = nullptr;   ///< bf16 [rows,128]
  int64_t x_stride = 128;    ///< elements from row to row, a multiple of 8
  void* codes = nullptr;     ///< e4m3 [rows,128], contiguous
  float* scale = nullptr;    ///< fp32 [rows], a multiplier
  bool hadamard = true;
  bool power_of_two = true;  ///< false: plain scales

  CUstream_st* stream = nullptr;
};

/// Whether the Hopper kernel takes this input on the current device; otherwise *why_not says what is missing.
bool sm90_supports(const HadamardQuantiseParams& p, const char** why_not);

/// Enqueues the kernel. Throws std::runtime_error when sm90_supports refuses or CUDA reports an error.
void launch_hadamard_quantise_sm90(const HadamardQuantiseParams& p);

}  // namespace dsa
