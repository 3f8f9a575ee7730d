// FFN(x) = W_down( silu(W_gate x) * W_up x ): the dense layers' network and the shared expert. The intermediate
// size is split over the tensor axis; rows are gathered before and summed and scattered after.
#pragma once

#include "trainer/model/forward_pass.h"
#include "trainer/model/model_builder.h"

namespace dsa {

class Mlp {
 public:
  // prefix: "model.layers.L.mlp." or "model.layers.L.mlp.shared_experts."
  Mlp(const ModelBuilder& builder, const std::string& prefix, int64_t intermediate);
  at::Tensor forward(const at::Tensor& x_NM, const StagePlan& plan) const;

  // The same in two parts, all rows at once: a_TI = silu(W_gate x) * W_up x, then W_down a.
  at::Tensor hidden(const at::Tensor& x_NM) const;
  at::Tensor output(const at::Tensor& a_TI) const;

 private:
  Mesh& mesh_;
  at::Tensor gate_, up_, down_;
};

}  // namespace dsa
