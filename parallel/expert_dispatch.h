// Mixture of experts over a group of ranks: tokens travel to the ranks of their experts and the weighted results
// travel back.
//
//   out_n = sum over k of weights[n,k] * expert_{experts[n,k]}(x_n)
//
// Expert e lives on rank e / (num_experts / group size) of the group. A token goes once to each rank that has any of
// its experts (deduplicated), however many it has there. No capacity: nothing is padded, no token is dropped. On the
// way back the expert's rank forms the weighted sum of its experts for the token, so one row returns.
// Sums: first over the experts of one rank in ascending order, then over ranks in ascending order; in fp32 for
// bf16, rounded at each of the two steps.
//
// Rows travel beside the current stream: what dispatch() and combine() are given to do meanwhile runs while they are on
// their way, and so do its gradients in the backward pass.
//
// Every rank takes part in every collective, in forward and backward, in the same order, also with no tokens or no
// rows. A rank whose rows are empty may therefore skip its experts and pass any [0, H] tensor to combine().
//
// Letters: N tokens of this rank, K experts a token, H row width, M (token, expert) rows this rank computes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "parallel/communicator.h"

namespace dsa {

struct ExpertRouting;

class ExpertDispatch {
 public:
  /// experts_NK int64, each row distinct, in [0, num_experts); weights_NK floating. Collective: exchanges counts and
  /// the (token, expert) lists. `group` must outlive the graph. Throws std::invalid_argument for experts out of
  /// range or repeated, other shapes or dtypes, and num_experts that the group's size does not divide.
  ExpertDispatch(const at::Tensor& experts_NK, const at::Tensor& weights_NK, int64_t num_experts, Communicator& group);

  ~ExpertDispatch();
  ExpertDispatch(const ExpertDispatch&) = delete;
  ExpertDispatch& operator=(const ExpertDispatch&) = delete;

  /// x_NH -> rows_MH: what this rank's experts compute, sorted by local expert, then source rank, then token.
  /// Differentiable. Once per object. `meanwhile` is called between the rows' departure and their arrival.
  at::Tensor dispatch(const at::Tensor& x_NH, const std::function<void()>& meanwhile = {});

  /// Rows of each local expert: [num_experts / group size], their sum is M.
  const std::vector<int64_t>& rows_per_expert() const;

  /// y_MH in dispatch's row order -> out_NH, of y's dtype. Differentiable in y and weights. After dispatch().
  at::Tensor combine(const at::Tensor& y_MH, const std::function<void()>& meanwhile = {});

 private:
  c10::intrusive_ptr<ExpertRouting> routing_;
  at::Tensor weights_NK_;
  at::Tensor link_;  // ties combine's node to dispatch's, so that both run in backward on every rank
};

}  // namespace dsa
