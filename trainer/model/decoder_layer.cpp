#include "trainer/model/decoder_layer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>

#include "kernels/rms_norm/rms_norm.h"
#include "trainer/model/recompute.h"

namespace dsa {
namespace {

std::string prefix_of(int64_t number) { return "model.layers." + std::to_string(number) + "."; }

std::variant<Mlp, Moe> make_ffn(const ModelBuilder& builder, int64_t number) {
  const std::string prefix = prefix_of(number) + "mlp.";
  if (builder.config.is_moe(number)) return Moe(builder, prefix, number);
  return Mlp(builder, prefix, builder.config.intermediate_size);
}

}  // namespace

DecoderLayer::DecoderLayer(const ModelBuilder& builder, int64_t number, bool hadamard)
    : eps_(builder.config.rms_norm_eps),
      input_norm_(builder.vector(prefix_of(number) + "input_layernorm.weight", builder.config.hidden_size)),
      post_norm_(builder.vector(prefix_of(number) + "post_attention_layernorm.weight", builder.config.hidden_size)),
      attention_(builder, prefix_of(number) + "self_attn.", number, hadamard),
      ffn_(make_ffn(builder, number)) {}

FeedForwardOutput DecoderLayer::forward(const at::Tensor& x_NM, const ForwardPass& pass) const {
  if (!pass.plan.layer_recompute) {
    TopK selection;
    return run(x_NM, pass, selection);
  }
  // The selection of the first run is kept (of the own rows; top-k int32 and, to learn from, fp32) for the second.
  auto selection = std::make_shared<TopK>();
  auto [y_NM, balance] = recompute(x_NM, [this, pass, selection](const at::Tensor& x, bool first_of_two) {
    ForwardPass again = pass;
    again.first_of_two = first_of_two;
    FeedForwardOutput out = run(x, again, *selection);
    return std::pair(out.y_NM, out.balance);
  }, pass.hidden);
  return {y_NM, balance};
}

FeedForwardOutput DecoderLayer::run(const at::Tensor& x_NM, const ForwardPass& pass, TopK& selection) const {
  const at::Tensor x1_NM = x_NM + attention_.forward(rms_norm(x_NM, input_norm_, eps_), pass, selection);
  const at::Tensor h_NM = rms_norm(x1_NM, post_norm_, eps_);
  if (const Moe* moe = std::get_if<Moe>(&ffn_)) {
    FeedForwardOutput out = moe->forward(h_NM, pass);
    return {x1_NM + out.y_NM, out.balance};
  }
  return {x1_NM + std::get<Mlp>(ffn_).forward(h_NM, pass.plan), at::zeros({}, x_NM.options().requires_grad(false))};
}

}  // namespace dsa
