// The differentiable collectives. Each is a linear map and its backward is the transposed map, where "the loss" is
// the sum of the losses of all ranks:
//
//   gather_rows          y = [x_0; x_1; ...]            dx_r = sum over ranks of block r of dy
//   reduce_scatter_rows  y_r = sum over ranks, block r  dx   = [dy_0; dy_1; ...]
//   all_to_all_rows      blocks change places           and go back
//
// and for a tensor x that all ranks hold alike (one logical value; a loss computed alike everywhere counts once):
//
//   copy_to              y = x, each rank continues with work of its own      dx = sum over ranks of dy
//   reduce_from          y = sum over ranks of x, the same everywhere         dx = dy
//
// dtypes: bf16, fp32, fp64. In a group of one each returns x itself: no node, no copy. The communicator must outlive
// the graph. Backward runs collectives: all ranks need the same graph, with requires_grad set alike.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "parallel/communicator.h"

namespace dsa {

/// x [n, ...] -> [size*n, ...], n equal on all ranks.
at::Tensor gather_rows(const at::Tensor& x, Communicator& group);
/// x [size*n, ...] -> [n, ...].
at::Tensor reduce_scatter_rows(const at::Tensor& x, Communicator& group);
/// x of any shape -> the same.
at::Tensor copy_to(const at::Tensor& x, Communicator& group);
/// x of any shape -> the same shape, summed.
at::Tensor reduce_from(const at::Tensor& x, Communicator& group);
/// x [sum(send_counts), ...] -> [sum(recv_counts), ...]; counts as in Communicator::all_to_all.
at::Tensor all_to_all_rows(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                           const std::vector<int64_t>& recv_counts, Communicator& group);

}  // namespace dsa
