// T context rows, N own rows, M hidden, V this rank's vocabulary rows
#include "trainer/model/embedding.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/cross_entropy/cross_entropy.h"
#include "parallel/collectives.h"

namespace dsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

int64_t first_row(const at::Tensor& weight_VM, Mesh& mesh) { return mesh.coordinates().tensor * weight_VM.size(0); }

struct VocabularyLoss : torch::autograd::Function<VocabularyLoss> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& h_TM, const at::Tensor& weight_VM,
                            const at::Tensor& target_T, int64_t first, Communicator* tensor, bool learns) {
    const VocabShardStatistics s = vocab_shard_statistics(h_TM, weight_VM, target_T, first);
    // [ranks, 3, T]: every rank adds the pieces in the same order.
    const at::Tensor all = tensor->all_gather(at::stack({s.max_N, s.sum_exp_N, s.target_logit_N}).unsqueeze(0));
    const at::Tensor max_T = std::get<0>(all.select(1, 0).max(0));
    at::Tensor sum_T = at::zeros_like(max_T), logit_T = at::zeros_like(max_T);
    for (int64_t r = 0; r < tensor->size(); ++r) {
      sum_T += all[r][1] * (all[r][0] - max_T).exp();
      logit_T += all[r][2];
    }
    const at::Tensor lse_T = max_T + sum_T.log();
    const at::Tensor valid_T = (target_T >= 0).to(lse_T.scalar_type());
    if (learns) {
      VocabShardGradients g = vocab_shard_gradients(h_TM, weight_VM, target_T, first, lse_T, valid_T);
      ctx->save_for_backward({g.dhidden_NH, g.dweight_VH});
      ctx->saved_data["dtype"] = static_cast<int64_t>(h_TM.scalar_type());
    }
    return ((lse_T - logit_T) * valid_T).sum();
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    return {(saved[0] * gradients[0]).to(dtype), saved[1] * gradients[0].to(saved[1].scalar_type()), {}, {}, {}, {}};
  }
};

}  // namespace

Embedding::Embedding(const ModelBuilder& builder)
    : mesh_(builder.mesh),
      weight_VM_(builder.tensor_split_matrix("model.embed_tokens.weight", builder.config.vocab_size,
                                             builder.config.hidden_size, 0)) {
  first_ = first_row(weight_VM_, mesh_);
}

at::Tensor Embedding::forward(const at::Tensor& ids_T) const {
  Communicator& tensor = mesh_.along(Axis::TENSOR);
  if (tensor.size() == 1) return at::embedding(weight_VM_, ids_T);
  const at::Tensor local_T = ids_T - first_;
  const at::Tensor here_T = (local_T >= 0).logical_and(local_T < weight_VM_.size(0));
  const at::Tensor rows_TM = at::embedding(weight_VM_, local_T * here_T) * here_T.unsqueeze(1).to(weight_VM_.scalar_type());
  return reduce_scatter_rows(rows_TM, tensor);
}

LmHead::LmHead(const ModelBuilder& builder)
    : mesh_(builder.mesh),
      weight_VM_(builder.tensor_split_matrix("lm_head.weight", builder.config.vocab_size, builder.config.hidden_size, 0)) {
  first_ = first_row(weight_VM_, mesh_);
}

at::Tensor LmHead::loss_sum(const at::Tensor& h_NM, const at::Tensor& target_T) const {
  Communicator& tensor = mesh_.along(Axis::TENSOR);
  const bool learns = c10::GradMode::is_enabled() && h_NM.requires_grad();
  return VocabularyLoss::apply(gather_rows(h_NM, tensor), weight_VM_, target_T, first_, &tensor, learns);
}

at::Tensor LmHead::logits_TV(const at::Tensor& h_NM) const {
  const c10::NoGradGuard no_grad;
  Communicator& tensor = mesh_.along(Axis::TENSOR);
  const at::Tensor local_TV = vocab_shard_logits(tensor.all_gather(h_NM.detach()), weight_VM_.detach());
  return tensor.all_gather(local_TV.t()).t().contiguous();
}

}  // namespace dsa
