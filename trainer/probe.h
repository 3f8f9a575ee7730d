// `dsatrain probe`: one pass of a model over given tokens, everything of interest written down under fixed names, so
// that any other implementation can be compared with this one.
//
//   logits [B,T,V]  hidden.{i} [B,T,M]  final_norm [B,T,M]  lm_loss [1]
//   router.{L}.experts [B*T,K] I32 ascending   router.{L}.weights [B*T,K]
//   indexer.{L}.scores [B,T,T], -inf above the diagonal   indexer.{L}.topk_mask [B,T,T] U8
//   warmup.{L}.rows / sparse.{L}.rows [B,T]: the indexer's KL, dense or sparse attention
//   mtp.logits [B,T-1,V]  mtp.loss_mean [1]: mean over the targets inside the sequences
// with gradients:
//   grad.{HF name}: of lm_loss, every backbone tensor
//   warmup|sparse.{L}.grad.{wq_b.weight ...}: of the layer's summed row KL, layer inputs and target detached
// Numbers are F64 in fp64 runs, else F32.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "parallel/mesh.h"
#include "trainer/model/forward_pass.h"
#include "trainer/model/transformer.h"

namespace dsa {

struct ProbeOptions {
  std::string model;   // HF folder, native checkpoint or run folder
  std::string tokens;  // safetensors file with input_ids I32 [B,T]
  std::string out;
  AttentionMode attention = AttentionMode::DENSE;
  bool gradients = false;
  int64_t query_block = 128;
  ModelOptions model_options;
  // An indexer for a checkpoint that has none (or instead of its own): tensors under their released names, or random.
  std::string indexer_from;
  std::optional<uint64_t> indexer_seed;
  std::optional<int64_t> indexer_heads, indexer_head_dim, top_k;
};

// Collective. The data axis repeats the same tokens. Throws InputError for tokens outside the vocabulary, a model
// without an indexer where one is needed, an existing output file.
void probe(const ProbeOptions& options, Mesh& mesh);

}  // namespace dsa
