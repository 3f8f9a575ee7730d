#include "trainer/model/mlp.h"

#include "kernels/grouped_mlp/grouped_mlp.h"
#include "parallel/collectives.h"

namespace dsa {

Mlp::Mlp(const ModelBuilder& builder, const std::string& prefix, int64_t intermediate) : mesh_(builder.mesh) {
  const int64_t hidden = builder.config.hidden_size;
  gate_ = builder.tensor_split_matrix(prefix + "gate_proj.weight", intermediate, hidden, 0);
  up_ = builder.tensor_split_matrix(prefix + "up_proj.weight", intermediate, hidden, 0);
  down_ = builder.tensor_split_matrix(prefix + "down_proj.weight", hidden, intermediate, 1);
}

at::Tensor Mlp::forward(const at::Tensor& x_NM) const {
  Communicator& tensor = mesh_.along(Axis::TENSOR);
  return reduce_scatter_rows(swiglu_mlp(gather_rows(x_NM, tensor), gate_, up_, down_), tensor);
}

}  // namespace dsa
