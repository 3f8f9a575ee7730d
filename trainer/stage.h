// Stages are data. What each trains, and how (paper sections 2.1 and 3):
//
//               attention   backbone   indexer
//   PRETRAIN    dense       learns     none
//   WARMUP      dense       frozen     learns, KL over all keys
//   SPARSE      sparse      learns     learns, KL over the selected keys
#pragma once

#include "recipes/recipe.h"
#include "trainer/model/forward_pass.h"

namespace dsa {

// Loss scales for one step: means over the global batch. lm_targets: targets of the whole batch on all ranks.
StagePlan plan_step(const Recipe& recipe, const ModelConfig& config, int64_t lm_targets);

// The same pass without any gradient, for held-out data.
StagePlan plan_evaluation(const Recipe& recipe);

}  // namespace dsa
