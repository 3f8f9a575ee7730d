// One pre-norm block (spec 1.2):  x1 = x + Attn(RMSNorm(x));   y = x1 + FFN(RMSNorm(x1))
#pragma once

#include <variant>

#include "trainer/model/mla.h"
#include "trainer/model/moe.h"

namespace dsa {

class DecoderLayer {
 public:
  // number: of the HF name "model.layers.<number>." and of the report (MTP modules come after the last layer).
  DecoderLayer(const ModelBuilder& builder, int64_t number, bool hadamard);

  // x_NM -> y_NM and this rank's part of the balance loss. With plan.layer_recompute only x is kept for the backward
  // pass, which runs the layer again.
  FeedForwardOutput forward(const at::Tensor& x_NM, const ForwardPass& pass) const;

 private:
  FeedForwardOutput run(const at::Tensor& x_NM, const ForwardPass& pass, TopK& selection) const;

  double eps_;
  at::Tensor input_norm_, post_norm_;
  Mla attention_;
  std::variant<Mlp, Moe> ffn_;
};

}  // namespace dsa
