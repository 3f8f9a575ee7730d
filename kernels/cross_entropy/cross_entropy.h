// Cross-entropy over a shard of the vocabulary, in tiles: the [N,V] logits never exist.
//
//   logits = hidden W^T (fp32 sums; fp64 for fp64)     loss[n] = lse[n] - logits[n, target[n]]
//   over ranks: m = max_r max_r;  lse = m + log sum_r sum_exp_r exp(max_r - m);  target logit = sum_r
//   backward: dlogits = (softmax - onehot) * grad[n];  dhidden = dlogits W (sum over ranks);  dW = dlogits^T hidden
//
// Letters: N tokens, H hidden, V rows of this rank's vocabulary shard (global ids offset .. offset+V-1).
// A target < 0 has no loss: its target logit is 0 and the caller gives it grad 0.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

struct VocabShardStatistics {
  at::Tensor max_N;           ///< largest local logit
  at::Tensor sum_exp_N;       ///< sum of exp(logit - max_N) over the shard
  at::Tensor target_logit_N;  ///< the target's logit where this shard holds it, else 0
};                            ///< all fp32 (fp64 for fp64)

struct VocabShardGradients {
  at::Tensor dhidden_NH;  ///< this shard's part, fp32 (fp64): reduce over the tensor group, then round
  at::Tensor dweight_VH;  ///< complete, dtype of the weight
};

/// hidden_NH, weight_VH of one dtype; target_N int64.
VocabShardStatistics vocab_shard_statistics(const at::Tensor& hidden_NH, const at::Tensor& weight_VH,
                                            const at::Tensor& target_N, int64_t offset);

/// lse_N: the global log-sum-exp; grad_N: d(total)/d(loss[n]); both fp32 (fp64).
VocabShardGradients vocab_shard_gradients(const at::Tensor& hidden_NH, const at::Tensor& weight_VH,
                                          const at::Tensor& target_N, int64_t offset, const at::Tensor& lse_N,
                                          const at::Tensor& grad_N);

/// Local logits of some rows, fp32 (fp64): for probes and tests.
at::Tensor vocab_shard_logits(const at::Tensor& hidden_NH, const at::Tensor& weight_VH);

}  // namespace dsa
