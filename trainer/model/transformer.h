// DeepSeek-V3.1 / V3.2: embedding, decoder layers, final norm, head, MTP modules (spec 1).
#pragma once

#include <deque>

#include "trainer/model/embedding.h"
#include "trainer/model/mtp.h"

namespace dsa {

struct ModelOptions {
  at::ScalarType dtype = at::kFloat;  // kFloat, kBFloat16 or kDouble
  bool hadamard = false;              // rotate the indexer's queries and keys
  bool mtp_pre_norm = false;          // feed the MTP modules the hidden state before the final norm
};

class Transformer {
 public:
  // Declares this rank's shards of every parameter; values are filled by initialise(). Throws std::invalid_argument
  // when a degree does not divide what it splits.
  Transformer(const ModelConfig& config, const ModelOptions& options, Mesh& mesh);

  // One microbatch. Returns the scaled sum of losses whose backward() gives the gradients; undefined when the plan
  // trains no backbone (the indexer's gradients are accumulated on the way).
  at::Tensor forward(const ForwardPass& pass) const;

  // An empty report with an entry for every layer.
  ModelReport report() const;
  ParameterList& parameters() { return list_; }
  const ModelConfig& config() const { return config_; }
  const ModelOptions& options() const { return options_; }
  Mesh& mesh() const { return mesh_; }

 private:
  at::Tensor run(const ForwardPass& pass) const;

  ModelConfig config_;
  ModelOptions options_;
  Mesh& mesh_;
  ParameterList list_;
  std::optional<Embedding> embedding_;
  std::deque<DecoderLayer> layers_;
  at::Tensor norm_;
  std::optional<LmHead> head_;
  std::deque<MtpModule> mtp_;
};

}  // namespace dsa
