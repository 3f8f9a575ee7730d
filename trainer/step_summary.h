// The numbers of one step, summed over ranks: what the losses are divided by, and what people see.
#pragma once

#include <vector>

#include "parallel/mesh.h"
#include "recipes/recipe.h"
#include "trainer/batch_loader.h"
#include "trainer/metrics/step_report.h"
#include "trainer/model/forward_pass.h"
#include "trainer/optimizer.h"

namespace dsa {

// Targets of the whole global batch by depth: [0] next token, [d] MTP module d. Collective.
std::vector<int64_t> global_targets(const Microbatches& batches, int64_t mtp_depth, Mesh& mesh);

// Losses per target, KL, entropy and recall per row and layer, norms, load, memory. Collective.
StepReport summarise(const ModelReport& report, const std::vector<int64_t>& targets, const GradientNorms& norms,
                     const Recipe& recipe, const ModelConfig& config, Mesh& mesh);

// Sum, and largest, of the ranks' numbers; the same on all of them.
std::vector<double> sum_over(Communicator& group, std::vector<double> numbers);
double max_over(Communicator& group, double number);

}  // namespace dsa
