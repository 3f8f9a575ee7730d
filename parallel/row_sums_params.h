// What the device kernels of row_sums.h need to know; no LibTorch, no CUDA header.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace dsa {

enum class RowType { BF16, FP32, FP64 };

struct RowSumsParams {
  RowType type = RowType::BF16;    ///< of x and out
  int64_t targets = 0, width = 0;
  const void* x = nullptr;         ///< [S, width] contiguous, 16-byte aligned, as is out
  const int64_t* first = nullptr;  ///< [targets + 1]
  const int64_t* row = nullptr;
  const void* weight = nullptr;    ///< [S] fp32 (fp64 for FP64), or null for 1
  void* out = nullptr;             ///< [targets, width]
  CUstream_st* stream = nullptr;
};

struct ScaledRowsParams {
  RowType type = RowType::BF16;    ///< of g, y and out
  int64_t rows = 0, width = 0;
  const void* g = nullptr;         ///< [S, width]; g, y and out contiguous, 16-byte aligned
  const int64_t* of = nullptr;     ///< [rows]
  const void* weight = nullptr;    ///< [rows] fp32 (fp64 for FP64)
  const void* y = nullptr;         ///< [rows, width]
  void* out = nullptr;             ///< [rows, width]
  void* dot = nullptr;             ///< [rows] fp32 (fp64 for FP64)
  CUstream_st* stream = nullptr;
};

/// Enqueue a kernel. Throw std::runtime_error when CUDA reports an error.
void launch_row_sums(const RowSumsParams& p);
void launch_scaled_rows(const ScaledRowsParams& p);

}  // namespace dsa
