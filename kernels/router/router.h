// The expert router (DeepSeek-V3 report eq. 13-16 with the released code's groups) and its sequence-wise balance
// loss (eq. 17-20).
//
//   s = sigmoid(logits);  r = s + b (selection only);  group score = sum of the 2 largest r of the group
//   keep the topk_group best groups;  pick the top_k largest r in them, ties to the lowest index
//   weight_i = s_i / (sum of the chosen s + 1e-20) * scaling        (without the division if !norm_topk_prob)
//
//   L_bal(sequence) = sum_i f_i P_i;  f_i = E / (top_k tokens) * count_i;  P_i = probability_i / tokens
//   count_i = number of tokens whose top_k unbiased s hold expert i;  probability_i = sum_t s_i,t / sum_j s_j,t
//
// Letters: N tokens, E experts, K experts per token, B sequences.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

struct RouterParameters {
  int64_t n_group = 8;
  int64_t topk_group = 4;
  int64_t top_k = 8;
  double scaling = 2.5;
  bool norm_topk_prob = true;
};

struct RouterOutput {
  at::Tensor experts_NK;  ///< int64, ascending
  at::Tensor weights_NK;  ///< dtype of the logits, differentiable in them
};

/// logits_NE fp32 or fp64; correction_bias_E same dtype or fp32, may be undefined (zero). Throws when groups do
/// not divide the experts or cannot hold top_k, and on NaN.
RouterOutput route(const at::Tensor& logits_NE, const at::Tensor& correction_bias_E,
                   const RouterParameters& parameters);

struct BalanceSums {
  at::Tensor count_BE;        ///< dtype of the logits, no gradient
  at::Tensor probability_BE;  ///< differentiable in the logits
};

/// This rank's share of the sums. sequence_N int64 [N] in [0, sequences): the sequence of every local token.
BalanceSums balance_sums(const at::Tensor& logits_NE, const at::Tensor& sequence_N, int64_t sequences,
                         int64_t top_k);

/// -> [B], one loss a sequence, without alpha. tokens_B: tokens of each WHOLE sequence. The loss is linear in
/// probability: give it the counts summed over all ranks that share the sequences and the LOCAL probability,
/// and the ranks' results add up to the loss, gradients included; no differentiable collective is needed.
at::Tensor balance_loss(const at::Tensor& count_BE, const at::Tensor& probability_BE, const at::Tensor& tokens_B,
                        int64_t top_k);

}  // namespace dsa
