// Multi-token prediction module (spec 1.8): layer L + d of the checkpoint.
//
//   z_i = eh_proj( [ enorm(Emb(t_{i+1})) ; hnorm(h_i) ] )     embedding first
//   y   = Block(z);   P(t_{i+2}) = lm_head( shared_head.norm(y_i) )
//
// Embedding and head are the model's own (the released files hold copies).
#pragma once

#include "trainer/model/decoder_layer.h"

namespace dsa {

class MtpModule {
 public:
  MtpModule(const ModelBuilder& builder, int64_t number, bool hadamard);
  // h_NM: the representation given by the previous depth; embedded_NM: embeddings of this depth's inputs.
  FeedForwardOutput forward(const at::Tensor& h_NM, const at::Tensor& embedded_NM, const ForwardPass& pass) const;
  at::Tensor head_norm(const at::Tensor& y_NM) const;

 private:
  double eps_;
  at::Tensor enorm_, hnorm_, eh_proj_, head_norm_;
  DecoderLayer block_;
};

}  // namespace dsa
