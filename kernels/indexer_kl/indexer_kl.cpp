// See indexer_kl.h.
#include "kernels/indexer_kl/indexer_kl.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/xlogy.h>

#include "kernels/check.h"

namespace dsa {

KlRows indexer_kl(const at::Tensor& scores_TX, const at::Tensor& target_TX, bool want_gradient) {
  require(scores_TX.dim() == 2, "indexer_kl: scores have shape {} ([rows, keys] is expected) reshape them", shape_of(scores_TX));
  require_shape(target_TX, scores_TX.sizes(), "indexer_kl", "target");
  require(scores_TX.scalar_type() == target_TX.scalar_type() && (scores_TX.scalar_type() == at::kFloat || scores_TX.scalar_type() == at::kDouble),
          "indexer_kl: scores are {} and the target {} (both fp32 or both fp64 are expected) convert one",
          toString(scores_TX.scalar_type()), toString(target_TX.scalar_type()));
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor off_TX = scores_TX.isneginf();
  const at::Tensor p_TX = target_TX.masked_fill(off_TX, 0);
  // A row without support gives NaN in log_softmax; off the support everything is 0.
  const at::Tensor logq_TX = at::log_softmax(scores_TX, 1).masked_fill_(off_TX, 0);
  const at::Tensor q_TX = logq_TX.exp().masked_fill_(off_TX, 0);
  const at::Tensor plogp_TX = at::xlogy(p_TX, p_TX);
  KlRows out;
  out.entropy_target_T = plogp_TX.sum(1).neg_();
  out.rows_T = plogp_TX.sub_(p_TX * logq_TX).sum(1);  // the difference first: the two sums nearly cancel
  out.entropy_prediction_T = (q_TX * logq_TX).sum(1).neg_();
  if (want_gradient) out.gradient_TX = q_TX.sub_(p_TX);
  return out;
}

at::Tensor captured_mass(const at::Tensor& target_TS, const TopK& selected) {
  require(target_TS.dim() == 2 && target_TS.size(0) == selected.indices_TK.size(0),
          "captured_mass: target {} beside indices {} (one list a row is expected) pass the same rows", shape_of(target_TS),
          shape_of(selected.indices_TK));
  const at::Tensor missing_TK = selected.indices_TK < 0;
  return target_TS.detach().gather(1, selected.indices_TK.clamp_min(0).to(at::kLong)).masked_fill_(missing_TK, 0).sum(1);
}

}  // namespace dsa
