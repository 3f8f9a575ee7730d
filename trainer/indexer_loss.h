// How the indexer learns (paper eq. 3 and 4; spec 4.1).
//
//   WARMUP  p[t,s] = 1/H sum_h softmax_s(scale q_h . k_h)     over all s of the row's range
//   SPARSE  p[t,i] = the same over the selected keys only (each head's softmax over S_t, then the mean)
//   L = sum_t KL(p[t] || softmax(I[t]));   dL/dI = softmax(I) - p;   then through I to wq_b, wk, k_norm, weights_proj
//
// The gradients are accumulated into the indexer's parameters here, when the target is known: in WARMUP while the layer
// runs forward, in SPARSE while it runs backward, where the probabilities cost nothing. The layer's input and the target are
// detached, so nothing else depends on them. Nothing of size rows x keys outlives a block of rows.
#pragma once

#include <functional>

#include "trainer/model/lightning_indexer.h"

namespace dsa {

struct IndexerLossTarget {
  int64_t layer;      // entry of ModelReport::layers
  int64_t all_heads;  // of the whole model: the target is the mean over them
  double scale;       // the main attention's softmax scale
  int64_t top_k;
};

// Of the own rows: q_NHD, k_SHD, all heads in MHA form; lse_NH, log-sum-exp of the dense forward.
void dense_indexer_loss(const IndexerLossTarget& target, const IndexerProjection& projection, const at::Tensor& q_NHD,
                        const at::Tensor& k_SHD, const at::Tensor& lse_NH, const ForwardPass& pass);

// Of the own rows: the selected keys; mass_NK, the sum over all heads of the probability of each; latent_queries (int64 [R]
// -> q [R,H,E]) and kv_SE serve the recall of the full attention's mass, measured on the sample rows.
using LatentQueries = std::function<at::Tensor(const at::Tensor& rows)>;
void sparse_indexer_loss(const IndexerLossTarget& target, const IndexerProjection& projection, const TopK& selection,
                         const at::Tensor& mass_NK, const LatentQueries& latent_queries, const at::Tensor& kv_SE,
                         const ForwardPass& pass);

}  // namespace dsa
