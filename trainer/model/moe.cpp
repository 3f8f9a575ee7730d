// N own rows, M hidden, E experts, K experts a token, B sequences
#include "trainer/model/moe.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include "kernels/grouped_mlp/grouped_mlp.h"
#include "parallel/expert_dispatch.h"

namespace dsa {

Moe::Moe(const ModelBuilder& builder, const std::string& prefix, int64_t layer)
    : mesh_(builder.mesh), layer_(layer), experts_(builder.config.n_routed_experts) {
  const ModelConfig& c = builder.config;
  routing_ = {c.n_group, c.topk_group, c.num_experts_per_tok, c.routed_scaling_factor, c.norm_topk_prob};
  router_ = builder.matrix(prefix + "gate.weight", experts_, c.hidden_size);
  correction_bias_ = builder.buffer(prefix + "gate.e_score_correction_bias", experts_);
  gate_ = builder.expert_matrices(prefix + "experts.%.gate_proj.weight", c.moe_intermediate_size, c.hidden_size);
  up_ = builder.expert_matrices(prefix + "experts.%.up_proj.weight", c.moe_intermediate_size, c.hidden_size);
  down_ = builder.expert_matrices(prefix + "experts.%.down_proj.weight", c.hidden_size, c.moe_intermediate_size);
  if (c.n_shared_experts > 0)
    shared_.emplace(builder, prefix + "shared_experts.", c.moe_intermediate_size * c.n_shared_experts);
}

FeedForwardOutput Moe::forward(const at::Tensor& h_NM, const ForwardPass& pass) const {
  const auto statistics = correction_bias_.scalar_type();
  const at::Tensor logits_NE = at::linear(h_NM.to(statistics), router_.to(statistics));
  const RouterOutput chosen = route(logits_NE, correction_bias_, routing_);

  ExpertDispatch dispatch(chosen.experts_NK, chosen.weights_NK, experts_, mesh_.along(Axis::EXPERT));
  // The shared expert computes while tokens travel: its first half on their way to the experts, its second on the way
  // back.
  at::Tensor hidden_TI, shared_NM;
  const at::Tensor rows_RM = dispatch.dispatch(h_NM, [&] {
    if (shared_) hidden_TI = shared_->hidden(h_NM);
  });
  const at::Tensor y_RM = grouped_swiglu(rows_RM, dispatch.rows_per_expert(), gate_, up_, down_);
  at::Tensor y_NM = dispatch.combine(y_RM, [&] {
    if (shared_) shared_NM = shared_->output(hidden_TI);
  });
  if (shared_) y_NM = y_NM + shared_NM;

  at::Tensor balance = at::zeros({}, logits_NE.options().requires_grad(false));
  if (pass.plan.balance_scale != 0) {
    const TokenBatch& b = pass.batch;
    BalanceSums sums = balance_sums(logits_NE, b.stream_row_N.div(b.length, "floor"), b.sequences, routing_.top_k);
    const at::Tensor count_BE = mesh_.along(Axis::SEQUENCE).all_reduce(sums.count_BE.detach());
    const at::Tensor tokens_B = at::full({b.sequences}, static_cast<double>(b.length), count_BE.options());
    balance = balance_loss(count_BE, sums.probability_BE, tokens_B, routing_.top_k).sum();
  }
  if (!pass.first_of_two) {
    const c10::NoGradGuard no_grad;
    at::Tensor& rows_E = pass.report.layers[layer_].expert_rows_E;
    const at::Tensor counts = at::bincount(chosen.experts_NK.flatten(), {}, experts_);
    rows_E = rows_E.defined() ? rows_E + counts : counts;
    pass.report.balance_loss += balance.item<double>();
    if (pass.recorder) {
      const std::string name = "router." + std::to_string(layer_);
      pass.recorder->rows_N[name + ".experts"] = chosen.experts_NK;
      pass.recorder->rows_N[name + ".weights"] = chosen.weights_NK.detach();
    }
  }
  return {y_NM, balance};
}

}  // namespace dsa
