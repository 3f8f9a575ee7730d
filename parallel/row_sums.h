// Sums of rows that lists name, and their gradients: how tokens are put together from what their experts computed.
//
//   row_sums:     out[t] = sum_i weight[row[i]] x[row[i]]      first[t] <= i < first[t+1], in this order
//   scaled_rows:  out[m] = weight[m] g[of[m]],                 dot[m] = g[of[m]] . y[m]
//
// Sums are fp32 (fp64 for fp64), rounded once; one order, whatever the device or the number of threads. On a GPU one
// pass over memory each (row_sums.cu).
// Letters: S source rows, T targets, N rows of lists, M rows, H row width.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace dsa {

/// x_SH fp64, fp32 or bf16; first_T1 int64 [T+1], ascending from 0 to N; row_N int64 [N], in [0, S); weight_S floating,
/// or undefined for 1 -> [T,H] of x's dtype. All on one device. Not differentiable.
at::Tensor row_sums(const at::Tensor& x_SH, const at::Tensor& first_T1, const at::Tensor& row_N, const at::Tensor& weight_S = {});

/// g_SH and y_MH of one dtype (fp64, fp32 or bf16); of_M int64 [M], in [0, S); weight_M floating -> out [M,H] of g's
/// dtype, dot [M] of weight's dtype. All on one device. Not differentiable.
std::pair<at::Tensor, at::Tensor> scaled_rows(const at::Tensor& g_SH, const at::Tensor& of_M, const at::Tensor& weight_M,
                                              const at::Tensor& y_MH);

}  // namespace dsa
