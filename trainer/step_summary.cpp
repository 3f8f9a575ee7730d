#include "trainer/step_summary.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "trainer/device_memory.h"
#include "trainer/router_bias.h"
#include "trainer/starting_point.h"

namespace dsa {

std::vector<double> sum_over(Communicator& group, std::vector<double> numbers) {
  const at::Tensor mine = at::from_blob(numbers.data(), {static_cast<int64_t>(numbers.size())}, at::kDouble);
  const at::Tensor all = group.all_reduce(mine);
  return {all.data_ptr<double>(), all.data_ptr<double>() + numbers.size()};
}

double max_over(Communicator& group, double number) {
  return group.all_reduce(at::from_blob(&number, {1}, at::kDouble), Reduction::MAX).item<double>();
}

std::vector<int64_t> global_targets(const Microbatches& batches, int64_t mtp_depth, Mesh& mesh) {
  std::vector<double> counts(static_cast<size_t>(mtp_depth + 1), 0);
  for (const auto& samples : batches) {
    const std::vector<int64_t> n = count_targets(samples, mtp_depth);
    for (size_t d = 0; d < n.size(); ++d) counts[d] += static_cast<double>(n[d]);
  }
  counts = sum_over(mesh.along(Axis::DATA), counts);
  return {counts.begin(), counts.end()};
}

StepReport summarise(const ModelReport& report, const std::vector<int64_t>& targets, const GradientNorms& norms,
                     const Recipe& recipe, const ModelConfig& config, Mesh& mesh) {
  // The ranks of a tensor group hold the same losses: each contributes its share.
  const double share = 1.0 / mesh.layout().degrees().tensor;
  std::vector<double> numbers{report.lm_loss * share, report.mtp_loss * share};
  for (const LayerReport& l : report.layers)
    numbers.insert(numbers.end(), {l.kl, l.kl_rows, l.entropy, l.recall, l.recall_rows});
  numbers = sum_over(mesh.along(Axis::WORLD), numbers);

  StepReport r;
  r.steps = recipe.schedule.steps;
  r.stage = stage_name(recipe.stage);
  r.lm_loss = numbers[0] / static_cast<double>(targets[0]);
  if (targets.size() > 1) r.mtp_loss = numbers[1] / static_cast<double>(std::max<int64_t>(targets[1], 1));
  if (recipe.stage != StageKind::WARMUP) r.grad_norm_backbone = norms.backbone;
  r.expert_load_max_over_mean = expert_load_max_over_mean(report, mesh);
  r.memory_bytes = static_cast<int64_t>(max_over(mesh.along(Axis::WORLD), static_cast<double>(peak_memory_bytes(mesh.device()))));
  if (recipe.stage == StageKind::PRETRAIN) return r;
  for (size_t l = 0; l < report.layers.size(); ++l) {
    const double* n = numbers.data() + 2 + 5 * l;
    r.kl_layer.push_back(n[0] / n[1]);
    r.entropy_layer.push_back(n[2] / n[1]);
    r.recall_layer.push_back(n[3] / n[4]);
  }
  r.kl_mean = mean(r.kl_layer);
  r.top_k = config.indexer->top_k;
  r.grad_norm_indexer = norms.indexer;
  return r;
}

}  // namespace dsa
