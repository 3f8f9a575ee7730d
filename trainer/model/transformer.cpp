// T context rows, N own rows, M hidden, V vocabulary
#include "trainer/model/transformer.h"

#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>

#include "kernels/rms_norm/rms_norm.h"

namespace dsa {

Transformer::Transformer(const ModelConfig& config, const ModelOptions& options, Mesh& mesh)
    : config_(config), options_(options), mesh_(mesh) {
  const ModelBuilder builder{config_, mesh_, options_.dtype, list_};
  embedding_.emplace(builder);
  for (int64_t l = 0; l < config_.num_hidden_layers; ++l) layers_.emplace_back(builder, l, options_.hadamard);
  norm_ = builder.vector("model.norm.weight", config_.hidden_size);
  head_.emplace(builder);
  for (int64_t d = 0; d < config_.num_nextn_predict_layers; ++d)
    mtp_.emplace_back(builder, config_.num_hidden_layers + d, options_.hadamard);
}

ModelReport Transformer::report() const {
  ModelReport report;
  report.layers.resize(config_.total_layers());
  return report;
}

at::Tensor Transformer::forward(const ForwardPass& pass) const {
  if (pass.plan.train_backbone) {
    ForwardPass kept = pass;
    if (pass.plan.offload_hidden && !mesh_.device().is_cpu())
      kept.hidden = std::make_shared<HiddenStates>(mesh_.device());
    return run(kept);
  }
  const c10::NoGradGuard no_grad;
  run(pass);
  return {};
}

at::Tensor Transformer::run(const ForwardPass& pass) const {
  const TokenBatch& b = pass.batch;
  const auto record = [&](const std::string& name, const at::Tensor& rows_NM) {
    if (pass.recorder) pass.recorder->rows_N[name] = rows_NM.detach();
  };
  at::Tensor x_NM = embedding_->forward(b.inputs_T[0]);
  record("hidden.0", x_NM);
  at::Tensor balance;
  const auto add_balance = [&](const at::Tensor& term) { balance = balance.defined() ? balance + term : term; };
  for (size_t l = 0; l < layers_.size(); ++l) {
    const FeedForwardOutput out = layers_[l].forward(x_NM, pass);
    x_NM = out.y_NM;
    add_balance(out.balance);
    record("hidden." + std::to_string(l + 1), x_NM);
  }
  at::Tensor h_NM = rms_norm(x_NM, norm_, config_.rms_norm_eps);
  record("final_norm", h_NM);
  if (pass.recorder) pass.recorder->context_rows_T["logits"] = head_->logits_TV(h_NM);
  at::Tensor sum = head_->loss_sum(h_NM, b.targets_T[0]);
  pass.report.lm_loss += sum.item<double>();
  at::Tensor loss = sum * pass.plan.lm_scale;

  for (size_t d = 0; d < mtp_.size(); ++d) {
    const at::Tensor previous_NM = options_.mtp_pre_norm ? x_NM : h_NM;
    const FeedForwardOutput out = mtp_[d].forward(previous_NM, embedding_->forward(b.inputs_T[d + 1]), pass);
    x_NM = out.y_NM;
    add_balance(out.balance);
    h_NM = mtp_[d].head_norm(x_NM);
    if (pass.recorder && d == 0) pass.recorder->context_rows_T["mtp.logits"] = head_->logits_TV(h_NM);
    sum = head_->loss_sum(h_NM, b.targets_T[d + 1]);
    pass.report.mtp_loss += sum.item<double>();
    loss = loss + sum * pass.plan.mtp_scale;
  }
  return loss + balance * pass.plan.balance_scale;
}

}  // namespace dsa
