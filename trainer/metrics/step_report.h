// What is known after one step, already reduced over all ranks. Absent (an empty optional or vector) means that the
// stage has no such number; NaN means that the number is NaN, and every sink shows it.
#pragma once

#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

namespace dsa {

struct StepReport {
  int64_t step = 0;   // steps finished, this one included: 1 is the first
  int64_t steps = 0;  // the recipe's
  std::string stage;  // "pretrain", "warmup", "sparse"

  std::optional<double> lm_loss, mtp_loss;  // nats per token
  std::optional<double> kl_mean;            // nats per query row, mean over rows and layers
  std::vector<double> kl_layer;             // mean over rows; [layers, MTP layers last], also the next two
  std::vector<double> recall_layer;         // attention mass on the top_k keys the indexer would choose, 0..1
  std::vector<double> entropy_layer;        // of the indexer's distribution, nats
  int64_t top_k = 0;
  std::optional<double> held_out_loss;    // when this step was followed by an evaluation
  std::optional<double> held_out_before;  // of the model that the run started from; with step 1

  std::optional<double> grad_norm_backbone, grad_norm_indexer;  // before clipping
  std::optional<double> lr, indexer_lr;
  std::optional<double> expert_load_max_over_mean;  // of the worst layer
  int64_t skipped_total = 0;                        // steps without an update because something was not finite

  int64_t tokens_total = 0;  // trained on since step 1, over all ranks
  double tokens_per_second = 0;
  double step_seconds = 0;   // whole step, data_seconds included
  double data_seconds = 0;   // waiting for the batch
  int64_t memory_bytes = 0;  // peak of the rank that needs most
  std::string checkpoint;    // what happened to the latest one, as in "100 ok"; may be empty
};

// The plain mean: one NaN makes it NaN. 0 for none.
inline double mean(const std::vector<double>& values) {
  return values.empty() ? 0.0 : std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

}  // namespace dsa
