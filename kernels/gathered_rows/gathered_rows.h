// Products with rows of a table that an index list names: the inner loops of everything sparse.
//
//   gathered_dots:       out[b,m,i]  = left[b,m,:W] . table[index[b,i], :W]             W = width of left
//   gathered_sums:       out[b,m,:W] = sum_i weight[b,m,i] table[index[b,i], :W]        W = width
//   add_outer_products:  table[index[b,i], :] += sum_m left[b,m,i] right[b,m,:]         in the order of b
//
// An index < 0 names no row: its dot is 0 and it adds nothing. All tensors of one dtype, fp32 or fp64; the last dim
// contiguous; index int32 or int64. On the CPU the rows are read where they lie (no gathered copy, which would be read
// and written more often than it is used); other devices gather and use batched products.
// Letters: B query rows, M heads, K listed rows, S table rows, E channels.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

/// left_BMW [B,M,W], W <= E -> [B,M,K]. Serial on the CPU: callers spread blocks of B over threads.
at::Tensor gathered_dots(const at::Tensor& left_BMW, const at::Tensor& table_SE, const at::Tensor& index_BK);

/// weight_BMK -> [B,M,width]. Serial on the CPU.
at::Tensor gathered_sums(const at::Tensor& weight_BMK, const at::Tensor& table_SE, const at::Tensor& index_BK, int64_t width);

/// Threads own columns of the table: no atomics, one order of summation for any number of them.
void add_outer_products(const at::Tensor& table_SE, const at::Tensor& left_BMK, const at::Tensor& right_BME,
                        const at::Tensor& index_BK);

}  // namespace dsa
