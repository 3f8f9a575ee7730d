// Token embedding and output head, both split over the tensor axis by vocabulary.
#pragma once

#include "trainer/model/model_builder.h"

namespace dsa {

class Embedding {
 public:
  explicit Embedding(const ModelBuilder& builder);  // model.embed_tokens.weight
  // ids_T int64 [context rows] -> [own rows, hidden]
  at::Tensor forward(const at::Tensor& ids_T) const;

 private:
  Mesh& mesh_;
  int64_t first_;
  at::Tensor weight_VM_;
};

class LmHead {
 public:
  explicit LmHead(const ModelBuilder& builder);  // lm_head.weight
  // h_NM: own rows after the final norm; target_T int64 [context rows], kNoTarget = none.
  // -> sum of -log softmax(h W^T)[target] over the context rank's rows, the same on all its tensor ranks. The
  // [rows, vocabulary] logits never exist; the gradient is formed in the forward pass and scaled in the backward.
  at::Tensor loss_sum(const at::Tensor& h_NM, const at::Tensor& target_T) const;
  // All logits [context rows, vocabulary], fp32 (fp64): for `probe`.
  at::Tensor logits_TV(const at::Tensor& h_NM) const;

 private:
  Mesh& mesh_;
  int64_t first_;
  at::Tensor weight_VM_;
};

}  // namespace dsa
