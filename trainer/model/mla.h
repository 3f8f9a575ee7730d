// Multi-head latent attention (spec 1.3), with the lightning indexer in front of it when the model has one.
//
//   qr = RMSNorm(h Wq_a^T)            q = qr Wq_b^T -> per head [nope | rope]
//   [c | k_rope] = h Wkv_a^T          c = RMSNorm(c); one rotated k_rope for all heads
//   DENSE, MHA form:    k_h = [W_UK,h c ; k_rope]   v_h = W_UV,h c    o_h = softmax(scale q_h . k_h) v_h
//   SPARSE, MQA form:   q~_h = [W_UK,h^T q_nope,h ; q_rope,h]         o_h = W_UV,h sum_{s in S_t} p_s c_s
//   u = concat_h(o_h) Wo^T
//
// Keys and values are gathered as latents alone (576 a token). Dense training splits heads over the tensor axis, rows over the
// context axis. Sparse attention, and dense attention whose probabilities the indexer learns, split rows over both, each with
// all heads, and gather the matrices over the tensor axis (0.34 GB a layer of the 671B model, less than a quarter of the rows
// at 131,072 tokens): gathered keys serve 128 heads, not 16, and a row's probabilities, the indexer's target, are all in one
// place.
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
  // Latent queries of the own rows, and keys -> u_NM. Dense, by blocks of this rank's heads, for all rows of the tensor group.
  at::Tensor attend_by_heads(const at::Tensor& qr_NQ, const at::Tensor& kv_SE, const ForwardPass& pass) const;
  // Dense, all heads of the own rows at once: the indexer's target is a sum over them.
  at::Tensor attend_measured(const at::Tensor& qr_NQ, const at::Tensor& kv_SE, const IndexerProjection& indexer,
                             const ForwardPass& pass) const;
  // Sparse, all heads of the own rows, by blocks of rows.
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
  // MHA form, for as many heads as q_b and kv_b have.
  struct Expanded {
    at::Tensor q_RHD, k_SHD, v_SHV;
  };
  Expanded expand(const at::Tensor& qr_RQ, const at::Tensor& kv_SE, const at::Tensor& q_b, const at::Tensor& kv_b,
                  const RopeTable& rope_R) const;

  Mesh& mesh_;
  int64_t layer_, heads_, all_heads_, nope_, rope_, value_, latent_;
  double eps_, scale_;
  at::Tensor q_a_, q_a_norm_, q_b_, kv_a_, kv_a_norm_, kv_b_, o_;
  std::optional<LightningIndexer> indexer_;
};

}  // namespace dsa
