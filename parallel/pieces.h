// What the communicators share: the pieces of a tensor, their arithmetic in rank order, and how a call is described.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "parallel/communicator.h"

namespace dsa {

/// pieces: one per rank, of one shape and dtype -> the same, a fresh tensor. SUM of bf16 and fp16 adds in fp32 and
/// rounds once; integers wrap; MAX and MIN carry NaN along.
at::Tensor combine_in_rank_order(const std::vector<at::Tensor>& pieces, Reduction reduction);

/// Bytes of one row of x (dimension 0 counts rows).
int64_t row_bytes(const at::Tensor& x);

/// Uninitialised, like x but with `rows` rows.
at::Tensor rows_like(const at::Tensor& x, int64_t rows);

/// "all_gather of Float [3, 2]", what a rank tells the others and the reader about a call. `rows_may_differ`: the row
/// count is left out, because ranks that agree may have different ones.
std::string describe_call(const char* call, const at::Tensor& x, bool rows_may_differ = false);
std::string describe_call(Reduction reduction, const at::Tensor& x);

}  // namespace dsa
