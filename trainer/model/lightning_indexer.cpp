// N own rows, T context rows, S stream keys, M hidden, Q latent query, J indexer heads, D head dim, K selected keys
#include "trainer/model/lightning_indexer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>

#include "kernels/hadamard/hadamard.h"
#include "kernels/indexer_logits/indexer_logits.h"
#include "kernels/indexer_topk/indexer_topk.h"
#include "kernels/rms_norm/rms_norm.h"
#include "parallel/collectives.h"

namespace dsa {
namespace {

constexpr double kLayerNormEps = 1e-6;

at::Tensor rotate_front(const at::Tensor& x, const RopeTable& table, int64_t rope_dim) {
  const int64_t last = x.dim() - 1;
  return at::cat({apply_rope(x.narrow(last, 0, rope_dim), table, RopeLayout::HALF),
                  x.narrow(last, rope_dim, x.size(last) - rope_dim)},
                 last);
}

}  // namespace

KeyRange key_range(const at::Tensor& start, const at::Tensor& end) {
  const int64_t first = start.min().item<int64_t>();
  return {first, std::max<int64_t>(end.max().item<int64_t>() - first, 0)};
}

LightningIndexer::LightningIndexer(const ModelBuilder& builder, const std::string& prefix, bool hadamard)
    : mesh_(builder.mesh),
      heads_(builder.config.indexer->heads),
      head_dim_(builder.config.indexer->head_dim),
      rope_dim_(builder.config.qk_rope_head_dim),
      top_k_(builder.config.indexer->top_k),
      hadamard_(hadamard) {
  const auto group = ParameterGroup::INDEXER;
  wq_b_ = builder.matrix(prefix + "wq_b.weight", heads_ * head_dim_, builder.config.q_lora_rank, group);
  wk_ = builder.matrix(prefix + "wk.weight", head_dim_, builder.config.hidden_size, group);
  k_norm_weight_ = builder.vector(prefix + "k_norm.weight", head_dim_, group);
  k_norm_bias_ = builder.vector(prefix + "k_norm.bias", head_dim_, group);
  weights_proj_ = builder.matrix(prefix + "weights_proj.weight", heads_, builder.config.hidden_size, group);
}

IndexerProjection LightningIndexer::project(const at::Tensor& h_NM, const at::Tensor& qr_NQ,
                                            const ForwardPass& pass) const {
  const at::Tensor h = h_NM.detach(), qr = qr_NQ.detach();
  const int64_t rows = h.size(0);
  at::Tensor q_NJD = at::linear(qr, wq_b_).view({rows, heads_, head_dim_});
  at::Tensor k_ND = layer_norm(at::linear(h, wk_), k_norm_weight_, k_norm_bias_, kLayerNormEps);
  q_NJD = rotate_front(q_NJD, pass.batch.rope_N, rope_dim_);
  k_ND = rotate_front(k_ND, pass.batch.rope_N, rope_dim_);
  if (hadamard_) {
    q_NJD = dsa::hadamard(q_NJD);
    k_ND = dsa::hadamard(k_ND);
  }
  const auto statistics = k_norm_weight_.scalar_type();
  const double scale = 1 / std::sqrt(static_cast<double>(heads_) * static_cast<double>(head_dim_));
  at::Tensor w_NJ = at::linear(h.to(statistics), weights_proj_.to(statistics)) * scale;
  return {q_NJD, pass.batch.to_stream.apply(gather_rows(k_ND, mesh_.along(Axis::SEQUENCE))), w_NJ};
}

TopK LightningIndexer::select(const IndexerProjection& p, const ForwardPass& pass) const {
  const c10::NoGradGuard no_grad;
  return indexer_topk(p.q_NJD, p.k_SD, p.w_NJ, pass.batch.start_N, pass.batch.end_N, top_k_, pass.plan.query_block,
                      pass.plan.indexer_loss && pass.plan.train_indexer);
}

void LightningIndexer::record(const IndexerProjection& p, int64_t layer, const ForwardPass& pass) const {
  const c10::NoGradGuard no_grad;
  const std::string name = "indexer." + std::to_string(layer);
  pass.recorder->rows_N[name + ".scores"] =
      indexer_logits(p.q_NJD.detach(), p.k_SD.detach(), p.w_NJ.detach(), pass.batch.start_N, pass.batch.end_N);
  pass.recorder->context_rows_T[name + ".topk"] = mesh_.along(Axis::TENSOR).all_gather(select(p, pass).indices_TK);
}

}  // namespace dsa
