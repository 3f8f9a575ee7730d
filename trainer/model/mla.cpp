// N own rows, T context rows, S stream keys, M hidden, Q latent query, H local heads, D = P nope + R rope,
// V value dim, C latent, E = C + R, K selected keys
#include "trainer/model/mla.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/linear.h>
#include <c10/core/GradMode.h>

#include "kernels/dense_mla/dense_mla.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/sparse_mla/sparse_mla.h"
#include "parallel/collectives.h"
#include "trainer/indexer_loss.h"

namespace dsa {

Mla::Mla(const ModelBuilder& builder, const std::string& prefix, int64_t layer, bool hadamard)
    : mesh_(builder.mesh),
      layer_(layer),
      all_heads_(builder.config.num_attention_heads),
      nope_(builder.config.qk_nope_head_dim),
      rope_(builder.config.qk_rope_head_dim),
      value_(builder.config.v_head_dim),
      latent_(builder.config.kv_lora_rank),
      eps_(builder.config.rms_norm_eps),
      scale_(builder.config.softmax_scale()) {
  const ModelConfig& c = builder.config;
  heads_ = even_share("the attention heads", all_heads_, mesh_.layout().degrees().tensor, "tensor");
  q_a_ = builder.matrix(prefix + "q_a_proj.weight", c.q_lora_rank, c.hidden_size);
  q_a_norm_ = builder.vector(prefix + "q_a_layernorm.weight", c.q_lora_rank);
  q_b_ = builder.tensor_split_matrix(prefix + "q_b_proj.weight", all_heads_ * (nope_ + rope_), c.q_lora_rank, 0);
  kv_a_ = builder.matrix(prefix + "kv_a_proj_with_mqa.weight", latent_ + rope_, c.hidden_size);
  kv_a_norm_ = builder.vector(prefix + "kv_a_layernorm.weight", latent_);
  kv_b_ = builder.tensor_split_matrix(prefix + "kv_b_proj.weight", all_heads_ * (nope_ + value_), latent_, 0);
  o_ = builder.tensor_split_matrix(prefix + "o_proj.weight", c.hidden_size, all_heads_ * value_, 1);
  if (c.indexer) indexer_.emplace(builder, prefix + "indexer.", hadamard);
}

at::Tensor Mla::forward(const at::Tensor& h_NM, const ForwardPass& pass, TopK& selection) const {
  const TokenBatch& b = pass.batch;
  const at::Tensor qr_NQ = rms_norm(at::linear(h_NM, q_a_), q_a_norm_, eps_);
  const at::Tensor a_NE = at::linear(h_NM, kv_a_);
  const at::Tensor latent_NC = rms_norm(a_NE.narrow(1, 0, latent_), kv_a_norm_, eps_);
  const at::Tensor rope_NR = apply_rope(a_NE.narrow(1, latent_, rope_), b.rope_N, RopeLayout::INTERLEAVED);
  const at::Tensor kv_SE =
      b.stream(gather_rows(at::cat({latent_NC, rope_NR}, 1), mesh_.along(Axis::SEQUENCE)));

  IndexerProjection indexer;
  const bool measures = pass.plan.indexer_loss && !pass.first_of_two;
  const bool selects = pass.plan.attention == AttentionMode::SPARSE && !selection.indices_TK.defined();
  if (measures || selects) {
    const at::AutoGradMode grad(measures && pass.plan.train_indexer);
    indexer = indexer_->project(h_NM, qr_NQ, pass);
  }
  if (selects) selection = indexer_->select(indexer, pass);
  if (measures && pass.recorder) indexer_->record(indexer, layer_, pass);

  const at::Tensor qr_TQ = gather_rows(qr_NQ, mesh_.along(Axis::TENSOR));
  at::Tensor q_THD = at::linear(qr_TQ, q_b_).view({qr_TQ.size(0), heads_, nope_ + rope_});
  q_THD = at::cat({q_THD.narrow(2, 0, nope_),
                   apply_rope(q_THD.narrow(2, nope_, rope_), b.rope_T, RopeLayout::INTERLEAVED)}, 2);
  const at::Tensor o_THV = pass.plan.attention == AttentionMode::DENSE
                               ? attend_dense(q_THD, kv_SE, indexer, pass)
                               : attend_sparse(q_THD, kv_SE, indexer, pass, selection);
  const at::Tensor u_TM = at::linear(o_THV.reshape({o_THV.size(0), heads_ * value_}), o_);
  return reduce_scatter_rows(u_TM, mesh_.along(Axis::TENSOR));
}

at::Tensor Mla::attend_dense(const at::Tensor& q_THD, const at::Tensor& kv_SE, const IndexerProjection& indexer,
                             const ForwardPass& pass) const {
  const TokenBatch& b = pass.batch;
  const int64_t keys = kv_SE.size(0);
  const at::Tensor up_SHX = at::linear(kv_SE.narrow(1, 0, latent_), kv_b_).view({keys, heads_, nope_ + value_});
  const at::Tensor rope_SHR = kv_SE.narrow(1, latent_, rope_).unsqueeze(1).expand({keys, heads_, rope_});
  const at::Tensor k_SHD = at::cat({up_SHX.narrow(2, 0, nope_), rope_SHR}, 2);
  const DenseMlaOutput out = dense_mla(q_THD, k_SHD, up_SHX.narrow(2, nope_, value_), b.start_T, b.end_T, scale_,
                                       pass.plan.query_block);
  if (pass.plan.indexer_loss && !pass.first_of_two)
    dense_indexer_loss({mesh_, layer_, all_heads_, scale_, indexer_->top_k()}, indexer, q_THD.detach(), k_SHD.detach(),
                       out.lse_TH.detach(), pass);
  return out.o_THV;
}

at::Tensor Mla::attend_sparse(const at::Tensor& q_THD, const at::Tensor& kv_SE, const IndexerProjection& indexer,
                              const ForwardPass& pass, const TopK& selection) const {
  const at::Tensor b_HXC = kv_b_.view({heads_, nope_ + value_, latent_});
  const at::Tensor q_THE = at::cat({at::einsum("thp,hpc->thc", {q_THD.narrow(2, 0, nope_), b_HXC.narrow(1, 0, nope_)}),
                                    q_THD.narrow(2, nope_, rope_)}, 2);
  const bool measures = pass.plan.indexer_loss && !pass.first_of_two;
  const SparseMlaOutput out = sparse_mla(q_THE, kv_SE, selection.indices_TK, selection.lengths_T, scale_, latent_,
                                         pass.plan.query_block, measures);
  if (measures)
    sparse_indexer_loss({mesh_, layer_, all_heads_, scale_, indexer_->top_k()}, indexer, selection, out.mass_TK,
                        q_THE.detach(), kv_SE.detach(), pass);
  return at::einsum("thc,hvc->thv", {out.o_THC, b_HXC.narrow(1, nope_, value_)});
}

}  // namespace dsa
