// The lightning indexer (paper eq. 1; spec 1.5): which keys does a query deserve?
//
//   I[t,s] = sum_j w[t,j] * relu(q[t,j] . k[s])      w = (h weights_proj^T) * heads^-0.5 * head_dim^-0.5
//   q = RoPE(qr wq_b^T)     k = RoPE(LayerNorm(h wk^T))     rope part first, half-split rotation
//   S_t = the top_k keys of I[t, start..end), score descending, then index ascending
//
// Its inputs are detached: it learns from its own loss only. It is never replicated: each tensor rank scores,
// selects and trains the rows it owns; keys are gathered over all ranks of the sequence.
#pragma once

#include "kernels/topk_select/topk_select.h"
#include "trainer/model/forward_pass.h"
#include "trainer/model/model_builder.h"

namespace dsa {

// What the indexer computes for the rows of this rank. With gradients enabled the three carry their graph.
struct IndexerProjection {
  at::Tensor q_NJD, k_SD, w_NJ;
};

class LightningIndexer {
 public:
  // prefix: "model.layers.L.self_attn.indexer."
  LightningIndexer(const ModelBuilder& builder, const std::string& prefix, bool hadamard);

  // h_NM: output of the attention norm; qr_NQ: normalised latent query. Both are detached here.
  IndexerProjection project(const at::Tensor& h_NM, const at::Tensor& qr_NQ, const ForwardPass& pass) const;
  // The selected keys of the query rows this rank owns (N), as rows of the stream, and where the indexer is to learn from them
  // their scores: 1 GiB each at 131,072 rows of 2048.
  TopK select(const IndexerProjection& projection, const ForwardPass& pass) const;

  // For `probe`: "indexer.L.scores" [N, S] (-inf outside a row's range) and "indexer.L.topk" [T, K].
  void record(const IndexerProjection& projection, int64_t layer, const ForwardPass& pass) const;

  int64_t top_k() const { return top_k_; }

 private:
  Mesh& mesh_;
  int64_t heads_, head_dim_, rope_dim_, top_k_;
  bool hadamard_;
  at::Tensor wq_b_, wk_, k_norm_weight_, k_norm_bias_, weights_proj_;
};

// The keys that a block of rows can see at all: [first, first + count).
struct KeyRange {
  int64_t first, count;
};
KeyRange key_range(const at::Tensor& start, const at::Tensor& end);

}  // namespace dsa
