// lr(step): linear from 0 to the peak over warmup_steps, then constant, or cosine / linear down to final_lr at the
// last step. Steps count from 1.
#pragma once

#include "recipes/recipe.h"

namespace dsa {

// The factor of the peak; multiply lr and indexer_lr with it.
double lr_factor(const Recipe::Schedule& schedule, double peak_lr, int64_t step);

}  // namespace dsa
