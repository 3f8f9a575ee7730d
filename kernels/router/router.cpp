// See router.h. All choices go through topk_select: one total order everywhere.
#include "kernels/router/router.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "kernels/check.h"
#include "kernels/topk_select/topk_select.h"

namespace dsa {
namespace {

// 1 in the chosen columns, 0 elsewhere: [N, columns].
at::Tensor one_hot_rows(const at::Tensor& indices_NK, const at::Tensor& like_NC) {
  const at::Tensor index = indices_NK.to(at::kLong);
  return at::zeros_like(like_NC).scatter_(1, index, 1.0);
}

}  // namespace

RouterOutput route(const at::Tensor& logits_NE, const at::Tensor& correction_bias_E, const RouterParameters& p) {
  require(logits_NE.dim() == 2 && (logits_NE.scalar_type() == at::kFloat || logits_NE.scalar_type() == at::kDouble),
          "route: logits are {} {} (fp32 or fp64 [tokens, experts] is expected) route in fp32", toString(logits_NE.scalar_type()),
          shape_of(logits_NE));
  const int64_t N = logits_NE.size(0), E = logits_NE.size(1);
  require(p.n_group >= 1 && E % p.n_group == 0, "route: {} experts in {} groups (groups are equal) choose a divisor", E, p.n_group);
  const int64_t per_group = E / p.n_group;
  require(p.topk_group >= 1 && p.topk_group <= p.n_group && p.top_k >= 1 && p.top_k <= p.topk_group * per_group,
          "route: {} experts from {} of {} groups of {} (the kept groups must hold them) lower num_experts_per_tok or raise topk_group",
          p.top_k, p.topk_group, p.n_group, per_group);
  const at::Tensor s_NE = at::sigmoid(logits_NE);
  at::Tensor ranked_NE = s_NE.detach();
  if (correction_bias_E.defined()) {
    require_shape(correction_bias_E, {E}, "route", "correction bias");
    ranked_NE = ranked_NE + correction_bias_E.detach().to(ranked_NE.scalar_type());
  }
  if (p.topk_group < p.n_group) {
    const at::Tensor grouped = ranked_NE.view({N, p.n_group, per_group});
    const at::Tensor group_NG = std::get<0>(at::topk(grouped, std::min<int64_t>(2, per_group), 2)).sum(2);
    const at::Tensor kept_NG = one_hot_rows(topk_select(group_NG, p.topk_group).indices_TK, group_NG);
    ranked_NE = grouped.masked_fill((kept_NG == 0).unsqueeze(2), -std::numeric_limits<double>::infinity()).view({N, E});
  }
  RouterOutput out;
  out.experts_NK = topk_select(ranked_NE, p.top_k).indices_TK.to(at::kLong);
  out.weights_NK = s_NE.gather(1, out.experts_NK);
  if (p.norm_topk_prob) out.weights_NK = out.weights_NK / (out.weights_NK.sum(1, true) + 1e-20);
  out.weights_NK = out.weights_NK * p.scaling;
  return out;
}

BalanceSums balance_sums(const at::Tensor& logits_NE, const at::Tensor& sequence_N, int64_t sequences, int64_t top_k) {
  const int64_t E = logits_NE.size(1);
  require_shape(sequence_N, {logits_NE.size(0)}, "balance_sums", "sequence");
  require(top_k >= 1 && top_k <= E, "balance_sums: top_k is {} of {} experts (it counts chosen experts) choose 1..{}", top_k, E, E);
  const at::Tensor s_NE = at::sigmoid(logits_NE);
  const at::Tensor chosen_NE = one_hot_rows(topk_select(s_NE.detach(), top_k).indices_TK, s_NE.detach());
  // A product with the rows' membership: its order of additions is fixed on every device, an index_add's is not.
  const at::Tensor sequence_B = at::arange(sequences, sequence_N.options());
  const at::Tensor member_BN = (sequence_B.unsqueeze(1) == sequence_N.unsqueeze(0)).to(s_NE.scalar_type());
  return {member_BN.matmul(chosen_NE), member_BN.matmul(s_NE / s_NE.sum(1, true))};
}

at::Tensor balance_loss(const at::Tensor& count_BE, const at::Tensor& probability_BE, const at::Tensor& tokens_B,
                        int64_t top_k) {
  require_shape(probability_BE, count_BE.sizes(), "balance_loss", "probability");
  require_shape(tokens_B, {count_BE.size(0)}, "balance_loss", "tokens");
  const at::Tensor tokens = tokens_B.to(count_BE.scalar_type());
  const double experts = static_cast<double>(count_BE.size(1));
  return (count_BE.detach() * probability_BE).sum(1) * (experts / static_cast<double>(top_k)) / (tokens * tokens);
}

}  // namespace dsa
