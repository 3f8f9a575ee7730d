// The packed convention shared by every attention-like operation of this folder.
//
//   One stream holds S keys; T query rows look into it. Row t sees the keys start[t] <= s < end[t].
//   Causality, batch rows, packed documents and context-parallel offsets are all expressed by these two
//   numbers. The rows may be any subset of the stream in any order.
//
// Score tiles exist only for one RowBlock at a time, so nothing of size T x S x heads is ever kept.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace dsa {

/// Rows [row_begin, row_end), all with the same start, and the smallest key interval that covers their ranges.
struct RowBlock {
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;  ///< equal when no row of the block has a key
  int64_t common_end;          ///< every row of the block sees [key_begin, common_end)
};

/// The ranges of all rows, on the host, checked: 0 <= start <= end <= keys or the row is empty (start >= end).
/// start_T, end_T: int32 or int64 [T], any device. Throws on another shape, dtype, or a key outside [0, keys].
struct KeyRanges {
  std::vector<int64_t> start, end;
  KeyRanges(const at::Tensor& start_T, const at::Tensor& end_T, int64_t rows, int64_t keys);
};

/// Cuts the rows into blocks of at most `query_block` rows; also where start changes, so that a block
/// does not span two documents.
std::vector<RowBlock> row_blocks(const KeyRanges& ranges, int64_t query_block);

/// Writes `value` into the entries of tile_...BX (last two dims: rows of the block, keys
/// [key_begin, key_end) of the block) that the row does not see.
void fill_outside(const at::Tensor& tile_BX, const RowBlock& block, const KeyRanges& ranges, double value);

/// Runs body(i) for i in [0, count): on the CPU over the threads, each body without autograd and with serial
/// tensor operations; on other devices in order. Bodies write disjoint memory, so results do not depend on
/// which thread ran them.
void for_each_block(int64_t count, at::Device device, const std::function<void(int64_t)>& body);

/// fp64 for fp64, otherwise fp32: the dtype of statistics, softmax and accumulation.
at::ScalarType accumulation_type(const at::Tensor& x);

}  // namespace dsa
