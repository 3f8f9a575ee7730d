// What a forward pass of the model is told (StagePlan), what it runs on (TokenBatch) and what it reports.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "trainer/model/hidden_states.h"
#include "trainer/model/token_batch.h"

namespace dsa {

enum class AttentionMode { DENSE, SPARSE };

// A training stage is data: what attends how, what is trained, how the losses are weighted.
struct StagePlan {
  AttentionMode attention = AttentionMode::DENSE;
  bool train_backbone = true;
  bool indexer_loss = false;     // measure the indexer's KL, entropy and recall
  bool train_indexer = false;    // and accumulate its gradients: where its target is known, see indexer_loss.h
  bool layer_recompute = false;  // keep one hidden state a layer and run the layer again in the backward pass
  bool offload_hidden = false;   // in host memory, where the model lies on a GPU
  int64_t query_block = 256;     // rows of a score tile
  // What the inner tensors of attention or of a dense FFN may take at once; longer inputs go block by block, and each
  // block runs again in the backward pass (blockwise.h).
  int64_t block_bytes = int64_t{8} << 30;
  // Weights of the *sums* below in the total loss; the trainer puts 1 / (number of rows of the global batch) in.
  double lm_scale = 1, mtp_scale = 0, kl_scale = 0, balance_scale = 0;
};

// Sums over this rank's rows; the trainer adds them over ranks and divides.
struct LayerReport {
  double kl = 0, entropy = 0;              // sums over rows: KL(target || prediction), entropy of the prediction
  double recall = 0, recall_rows = 0;      // attention mass inside the indexer's top-k, and rows measured
  double kl_rows = 0;
  at::Tensor expert_rows_E;                // tokens routed to each expert (int64), undefined in dense layers
};
struct ModelReport {
  std::vector<LayerReport> layers;         // decoder layers, then MTP modules
  double lm_loss = 0, mtp_loss = 0, balance_loss = 0;  // sums over targets (REPLICA ranks hold parts)
};

// Keeps named tensors of one pass for `probe`, in local row order.
struct Recorder {
  std::map<std::string, at::Tensor> rows_N;          // one part on every rank of the sequence
  std::map<std::string, at::Tensor> context_rows_T;  // one part a context rank, the same on its tensor ranks
};

struct ForwardPass {
  const TokenBatch& batch;
  const StagePlan& plan;
  ModelReport& report;
  Recorder* recorder = nullptr;
  bool first_of_two = false;  // the gradient-free run of a recomputed layer: no indexer loss, no statistics
  std::shared_ptr<HiddenStates> hidden = nullptr;  // the recomputed layers' inputs, where they are offloaded
};

}  // namespace dsa
