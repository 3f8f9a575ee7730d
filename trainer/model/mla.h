// Multi-head latent attention (spec 1.3), with the lightning indexer in front of it when the model has one.
//
//   qr = RMSNorm(h Wq_a^T)            q = qr Wq_b^T -> per head [nope | rope]
//   [c | k_rope] = h Wkv_a^T          c = RMSNorm(c); one rotated k_rope for all heads
//   DENSE, MHA form:    k_h = [W_UK,h c ; k_rope]   v_h = W_UV,h c    o_h = softmax(scale q_h . k_h) v_h
//   SPARSE, MQA form:   q~_h = [W_UK,h^T q_nope,h ; q_rope,h]         o_h = W_UV,h sum_{s in S_t} p_s c_s
//   u = concat_h(o_h) Wo^T
//
// Only latents are gathered (576 a token). DENSE: heads are split over the tensor axis, rows over the context axis. SPARSE:
// rows are split over both, each with all heads, and the matrices are gathered over the tensor axis (0.34 GB a layer of the
// 671B model, less than a quarter of the rows at 131,072 tokens): gathered keys serve 128 heads, not 16, and a row's
// probabilities, the indexer's target, are all in one place.
#pragma once

#include <optional>

#include "trainer/model/lightning_indexer.h"

namespace dsa {

class Mla {
 public:
  // prefix: "model.layers.L.self_attn."; layer: the entry of ModelReport::layers it reports to.
  Mla(const ModelBuilder& builder, const std::string& prefix, int64_t layer, bool hadamard);

  // h_NM [own rows, hidden] -> [own rows, hidden]. `selection`, of the own rows, is filled by the first run and used again by
  // the second when a layer is recomputed, so that both attend to the same keys.
  at::Tensor forward(const at::Tensor& h_NM, const ForwardPass& pass, TopK& selection) const;

 private:
  // Latent queries and keys -> u_TM, this rank's heads' part of the output, by blocks of heads.
  at::Tensor attend_dense(const at::Tensor& qr_TQ, const at::Tensor& kv_SE, const IndexerProjection& indexer,
                          const ForwardPass& pass) const;
  // The same for the own rows and all heads -> u_NM, by blocks of rows.
  at::Tensor attend_sparse(const at::Tensor& qr_NQ, const at::Tensor& kv_SE, const IndexerProjection& indexer,
                           const ForwardPass& pass, const TopK& selection) const;
  // Of all heads. Differentiable, collective over the tensor group.
  struct WholeMatrices {
    at::Tensor q_b, kv_b, o;
  };
  WholeMatrices whole_matrices() const;
  // q of some rows and of as many heads as q_b has: not yet rotated; rotated; with W_UK absorbed, [rows, heads, C + R].
  at::Tensor projected_queries(const at::Tensor& qr_RQ, const at::Tensor& q_b) const;
  at::Tensor queries(const at::Tensor& qr_RQ, const at::Tensor& q_b, const RopeTable& rope_R) const;
  at::Tensor latent_queries(const at::Tensor& qr_RQ, const at::Tensor& q_b, const at::Tensor& kv_b,
                            const RopeTable& rope_R) const;

  Mesh& mesh_;
  int64_t layer_, heads_, all_heads_, nope_, rope_, value_, latent_;
  double eps_, scale_;
  at::Tensor q_a_, q_a_norm_, q_b_, kv_a_, kv_a_norm_, kv_b_, o_;
  std::optional<LightningIndexer> indexer_;
};

}  // namespace dsa
