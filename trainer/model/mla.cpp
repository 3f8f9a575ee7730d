// N own rows, T context rows, A the same in stream order, S stream keys, M hidden, Q latent query, H heads (all, or the local
// ones of attend_by_heads), D = P nope + R rope, V value dim, C latent, E = C + R, K selected keys
#include "trainer/model/mla.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <memory>

#include "kernels/absorption/absorption.h"
#include "kernels/dense_mla/dense_mla.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/sparse_mla/sparse_mla.h"
#include "parallel/collectives.h"
#include "trainer/indexer_loss.h"
#include "trainer/model/blockwise.h"

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
  const at::Tensor kv_SE = b.to_stream.apply(gather_rows(at::cat({latent_NC, rope_NR}, 1), mesh_.along(Axis::SEQUENCE)));

  IndexerProjection indexer;
  const bool measures = pass.plan.indexer_loss && !pass.first_of_two;
  const bool selects = pass.plan.attention == AttentionMode::SPARSE && !selection.indices_TK.defined();
  if (measures || selects) {
    const at::AutoGradMode grad(measures && pass.plan.train_indexer);
    indexer = indexer_->project(h_NM, qr_NQ, pass);
  }
  if (selects) selection = indexer_->select(indexer, pass);
  if (measures && pass.recorder) indexer_->record(indexer, layer_, pass);

  if (pass.plan.attention == AttentionMode::SPARSE) return attend_sparse(qr_NQ, kv_SE, indexer, pass, selection);
  return measures ? attend_measured(qr_NQ, kv_SE, indexer, pass) : attend_by_heads(qr_NQ, kv_SE, pass);
}

Mla::WholeMatrices Mla::whole_matrices() const {
  Communicator& tensor = mesh_.along(Axis::TENSOR);
  if (tensor.size() == 1) return {q_b_, kv_b_, o_};
  return {gather_rows(q_b_, tensor), gather_rows(kv_b_, tensor), gather_rows(o_.t().contiguous(), tensor).t()};
}

at::Tensor Mla::projected_queries(const at::Tensor& qr_RQ, const at::Tensor& q_b) const {
  return at::linear(qr_RQ, q_b).view({qr_RQ.size(0), -1, nope_ + rope_});
}

at::Tensor Mla::queries(const at::Tensor& qr_RQ, const at::Tensor& q_b, const RopeTable& rope_R) const {
  const at::Tensor q_RHD = projected_queries(qr_RQ, q_b);
  return at::cat({q_RHD.narrow(2, 0, nope_), apply_rope(q_RHD.narrow(2, nope_, rope_), rope_R, RopeLayout::INTERLEAVED)}, 2);
}

at::Tensor Mla::latent_queries(const at::Tensor& qr_RQ, const at::Tensor& q_b, const at::Tensor& kv_b,
                               const RopeTable& rope_R) const {
  const at::Tensor b_HXC = kv_b.view({all_heads_, nope_ + value_, latent_});
  return absorbed_queries(projected_queries(qr_RQ, q_b), b_HXC.narrow(1, 0, nope_), rope_R);
}

Mla::Expanded Mla::expand(const at::Tensor& qr_RQ, const at::Tensor& kv_SE, const at::Tensor& q_b, const at::Tensor& kv_b,
                          const RopeTable& rope_R) const {
  const at::Tensor up_SHX = at::linear(kv_SE.narrow(1, 0, latent_), kv_b).view({kv_SE.size(0), -1, nope_ + value_});
  const at::Tensor rope_SHR = kv_SE.narrow(1, latent_, rope_).unsqueeze(1).expand({-1, up_SHX.size(1), -1});
  return {queries(qr_RQ, q_b, rope_R), at::cat({up_SHX.narrow(2, 0, nope_), rope_SHR}, 2), up_SHX.narrow(2, nope_, value_)};
}

at::Tensor Mla::attend_by_heads(const at::Tensor& qr_NQ, const at::Tensor& kv_SE, const ForwardPass& pass) const {
  Communicator& tensor = mesh_.along(Axis::TENSOR);
  const at::Tensor qr_AQ = pass.batch.to_ascending.apply(gather_rows(qr_NQ, tensor));
  const int64_t T = qr_AQ.size(0), S = kv_SE.size(0);
  const int64_t bytes = (T * (nope_ + rope_) + S * (2 * nope_ + rope_ + value_) + T * value_) * qr_NQ.element_size();
  const int64_t block = std::clamp<int64_t>(pass.plan.block_bytes / bytes, 1, heads_);
  auto lse = std::make_shared<std::vector<at::Tensor>>((heads_ + block - 1) / block);  // of the first run
  const auto attend = [this, pass, lse](const Block& block, const std::vector<at::Tensor>& in) {
    const TokenBatch& b = pass.batch;
    const Expanded x = expand(in[0], in[1], in[2], in[3], b.rope_A);
    const bool second = block.known.defined();
    const DenseMlaOutput known{block.known, second ? lse->at(block.index) : at::Tensor()};
    const DenseMlaOutput out = dense_mla(x.q_RHD, x.k_SHD, x.v_SHV, b.start_A, b.end_A, scale_, pass.plan.query_block,
                                         second ? &known : nullptr);
    lse->at(block.index) = out.lse_TH;
    return out.o_THV;
  };
  const at::Tensor o_AHV =
      blockwise({{qr_AQ}, {kv_SE}, {q_b_, 0, nope_ + rope_}, {kv_b_, 0, nope_ + value_}}, heads_, block, 1, attend);
  return reduce_scatter_rows(at::linear(pass.batch.to_ascending.undo(o_AHV.reshape({T, heads_ * value_})), o_), tensor);
}

at::Tensor Mla::attend_measured(const at::Tensor& qr_NQ, const at::Tensor& kv_SE, const IndexerProjection& indexer,
                                const ForwardPass& pass) const {
  const TokenBatch& b = pass.batch;
  const WholeMatrices whole = whole_matrices();
  const Expanded x = expand(qr_NQ, kv_SE, whole.q_b, whole.kv_b, b.rope_N);
  const DenseMlaOutput out = dense_mla(x.q_RHD, x.k_SHD, x.v_SHV, b.start_N, b.end_N, scale_, pass.plan.query_block);
  dense_indexer_loss({layer_, all_heads_, scale_, indexer_->top_k()}, indexer, x.q_RHD.detach(), x.k_SHD.detach(),
                     out.lse_TH.detach(), pass);
  return at::linear(out.o_THV.reshape({qr_NQ.size(0), all_heads_ * value_}), whole.o);
}

at::Tensor Mla::attend_sparse(const at::Tensor& qr_NQ, const at::Tensor& kv_SE, const IndexerProjection& indexer,
                              const ForwardPass& pass, const TopK& selection) const {
  const int64_t N = qr_NQ.size(0);
  const bool measures = pass.plan.indexer_loss && !pass.first_of_two;
  // The probabilities of the selected keys, the indexer's target, come with the backward pass where there is one.
  const bool backward_follows = c10::GradMode::is_enabled() && qr_NQ.requires_grad();
  const WholeMatrices whole = whole_matrices();
  struct Target {
    at::Tensor mass_NK;
    int64_t rows = 0;
  };
  const auto learn = [this, pass, N, indexer, selection, target = std::make_shared<Target>(), qr = qr_NQ.detach(),
                      kv = kv_SE.detach(), q_b = whole.q_b.detach(), kv_b = whole.kv_b.detach()](int64_t first,
                                                                                               const at::Tensor& mass) {
    if (first == 0 && mass.size(0) == N) {
      target->mass_NK = mass;
    } else {
      if (!target->mass_NK.defined()) target->mass_NK = at::empty({N, mass.size(1)}, mass.options());
      target->mass_NK.narrow(0, first, mass.size(0)).copy_(mass);
    }
    if ((target->rows += mass.size(0)) < N) return;
    const c10::NoGradGuard no_grad;
    const auto latent = [&](const at::Tensor& rows) {
      const RopeTable& rope = pass.batch.rope_N;
      return latent_queries(qr.index_select(0, rows), q_b, kv_b,
                            {rope.cos_TR2.index_select(0, rows), rope.sin_TR2.index_select(0, rows)});
    };
    sparse_indexer_loss({layer_, all_heads_, scale_, indexer_->top_k()}, indexer, selection, target->mass_NK, latent,
                        kv, pass);
  };
  const auto attend = [this, pass, measures, backward_follows, selection, learn](const Block& block,
                                                                                 const std::vector<at::Tensor>& in) {
    const auto rows = [&](const at::Tensor& x) { return x.narrow(0, block.begin, block.count); };
    const RopeTable& rope = pass.batch.rope_N;
    const at::Tensor q_RHE = latent_queries(in[0], in[2], in[3], {rows(rope.cos_TR2), rows(rope.sin_TR2)});
    MassReceiver receive;
    if (measures && backward_follows) receive = [learn, first = block.begin](const at::Tensor& mass) { learn(first, mass); };
    const SparseMlaOutput out = sparse_mla(q_RHE, in[1], rows(selection.indices_TK), rows(selection.lengths_T), scale_, latent_,
                                           pass.plan.query_block, measures && !backward_follows, receive,
                                           (layer_ << 32) + block.index);
    if (out.mass_TK.defined()) learn(block.begin, out.mass_TK);
    const at::Tensor b_HXC = in[3].view({all_heads_, nope_ + value_, latent_});
    const at::Tensor o_RHV = expanded_values(out.o_THC, b_HXC.narrow(1, nope_, value_));
    return last_linear(block, o_RHV.view({block.count, all_heads_ * value_}), in[4]);
  };
  const int64_t bytes =
      all_heads_ * (2 * (nope_ + rope_) + 3 * (latent_ + rope_) + 2 * latent_ + 2 * value_) * qr_NQ.element_size();
  const int64_t block = std::max<int64_t>(pass.plan.block_bytes / bytes, 1);
  return blockwise({{qr_NQ, 0}, {kv_SE}, {whole.q_b}, {whole.kv_b}, {whole.o}}, N, block, 0, attend);
}

}  // namespace dsa
