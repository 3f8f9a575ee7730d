#include "trainer/model/mlp.h"

#include <ATen/ops/linear.h>

#include <algorithm>

#include "kernels/grouped_mlp/grouped_mlp.h"
#include "parallel/collectives.h"
#include "trainer/model/blockwise.h"

namespace dsa {

Mlp::Mlp(const ModelBuilder& builder, const std::string& prefix, int64_t intermediate) : mesh_(builder.mesh) {
  const int64_t hidden = builder.config.hidden_size;
  gate_ = builder.tensor_split_matrix(prefix + "gate_proj.weight", intermediate, hidden, 0);
  up_ = builder.tensor_split_matrix(prefix + "up_proj.weight", intermediate, hidden, 0);
  down_ = builder.tensor_split_matrix(prefix + "down_proj.weight", hidden, intermediate, 1);
}

at::Tensor Mlp::forward(const at::Tensor& x_NM, const StagePlan& plan) const {
  Communicator& tensor = mesh_.along(Axis::TENSOR);
  const at::Tensor x_TM = gather_rows(x_NM, tensor);
  const int64_t row_bytes = 6 * gate_.size(0) * gate_.element_size();  // three products and their gradients
  const auto network = [](const Block& block, const std::vector<at::Tensor>& in) {
    return block.known.defined() ? last_linear(block, swiglu_hidden(in[0], in[1], in[2]), in[3])
                                 : swiglu_mlp(in[0], in[1], in[2], in[3]);
  };
  const int64_t rows = std::max<int64_t>(plan.block_bytes / row_bytes, 1);
  const at::Tensor y_TM = blockwise({{x_TM, 0}, {gate_}, {up_}, {down_}}, x_TM.size(0), rows, 0, network);
  return reduce_scatter_rows(y_TM, tensor);
}

at::Tensor Mlp::hidden(const at::Tensor& x_NM) const {
  return swiglu_hidden(gather_rows(x_NM, mesh_.along(Axis::TENSOR)), gate_, up_);
}

at::Tensor Mlp::output(const at::Tensor& a_TI) const {
  return reduce_scatter_rows(at::linear(a_TI, down_), mesh_.along(Axis::TENSOR));
}

}  // namespace dsa
