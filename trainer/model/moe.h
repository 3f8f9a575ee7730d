// Mixture of experts (spec 1.7): s = sigmoid(h e^T) in fp32, groups, top-k by s + bias, weights from s alone,
// routed experts over the expert axis, one shared expert for every token. No token is ever dropped.
#pragma once

#include <optional>

#include "kernels/router/router.h"
#include "trainer/model/forward_pass.h"
#include "trainer/model/mlp.h"

namespace dsa {

struct FeedForwardOutput {
  at::Tensor y_NM;
  at::Tensor balance;  // sum over the microbatch's sequences of this rank's part of the balance loss; a scalar
};

class Moe {
 public:
  // prefix: "model.layers.L.mlp."; layer: the entry of ModelReport::layers.
  Moe(const ModelBuilder& builder, const std::string& prefix, int64_t layer);
  FeedForwardOutput forward(const at::Tensor& h_NM, const ForwardPass& pass) const;

 private:
  Mesh& mesh_;
  int64_t layer_, experts_;
  RouterParameters routing_;
  at::Tensor router_, correction_bias_, gate_, up_, down_;
  std::optional<Mlp> shared_;
};

}  // namespace dsa
