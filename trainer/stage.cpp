#include "trainer/stage.h"

#include <algorithm>

namespace dsa {

StagePlan plan_evaluation(const Recipe& recipe) {
  StagePlan plan;
  plan.attention = recipe.stage == StageKind::SPARSE ? AttentionMode::SPARSE : AttentionMode::DENSE;
  plan.train_backbone = false;
  plan.query_block = recipe.compute.query_block;
  return plan;
}

StagePlan plan_step(const Recipe& recipe, const ModelConfig& config, int64_t lm_targets) {
  StagePlan plan = plan_evaluation(recipe);
  plan.train_backbone = recipe.stage != StageKind::WARMUP;
  plan.indexer_loss = plan.train_indexer = recipe.stage != StageKind::PRETRAIN;
  plan.layer_recompute = plan.train_backbone && recipe.compute.recompute == Recompute::LAYER;
  plan.offload_hidden = plan.layer_recompute && recipe.compute.offload_hidden;
  const double sequences = static_cast<double>(recipe.batch.sequences);
  const double rows = sequences * static_cast<double>(recipe.data.sequence_length);
  plan.lm_scale = 1 / static_cast<double>(std::max<int64_t>(lm_targets, 1));
  // V3 report eq. 24 and 25: each depth's sum is divided by the length, the depths are averaged.
  plan.mtp_scale = recipe.loss.mtp_weight / (rows * static_cast<double>(std::max<int64_t>(config.num_nextn_predict_layers, 1)));
  plan.kl_scale = recipe.loss.kl_weight / rows;
  plan.balance_scale = recipe.loss.balance_alpha / sequences;
  return plan;
}

}  // namespace dsa
