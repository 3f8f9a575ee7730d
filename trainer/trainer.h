// The training loop. One step, top to bottom, is Trainer::step in trainer.cpp.
#pragma once

#include <memory>

#include "trainer/batch_loader.h"
#include "trainer/metrics/console.h"
#include "trainer/metrics/metrics_writer.h"
#include "trainer/model/transformer.h"
#include "trainer/optimizer.h"
#include "trainer/starting_point.h"

namespace dsa {

class Trainer {
 public:
  // Collective: checks everything, then loads weights. Throws RecipeError, InputError, std::invalid_argument.
  Trainer(const ResolvedRecipe& recipe, Mesh& mesh);
  ~Trainer();

  // Runs to the last step, saving on the way. Throws RunFailure.
  void run();

  // One optimizer step; `number` counts from 1.
  StepReport step(int64_t number);
  // Mean loss per token on held-out sequences, with the stage's attention.
  double held_out_loss();
  void save(int64_t number);

  Transformer& model() { return model_; }
  const ShardedAdamW& optimizer() const { return *optimizer_; }
  int64_t steps_done() const { return done_; }

 private:
  void announce(const std::vector<std::string>& devices);
  // Runs `work`; when the device's memory does not suffice, throws the RunFailure that says so.
  template <class Work>
  auto within_memory(const std::string& activity, const Work& work);
  void finish(const std::string& reason);

  ResolvedRecipe resolved_;
  const Recipe& recipe_;
  Mesh& mesh_;
  StartingPoint start_;
  std::unique_ptr<TokenDataset> dataset_;
  std::string tokenizer_;  // one line: whether it was compared with the model's
  BatchLoader loader_;
  Transformer model_;
  std::unique_ptr<ShardedAdamW> optimizer_;
  int64_t done_ = 0, skipped_ = 0, skipped_in_a_row_ = 0, failed_saves_ = 0;
  std::string last_checkpoint_, checkpoint_note_;
  double checkpoint_seconds_ = 0, born_ = 0;
  std::unique_ptr<Console> console_;        // rank 0 only, as the next two
  std::unique_ptr<MetricsWriter> metrics_;
  std::unique_ptr<class RunLock> lock_;
};

}  // namespace dsa
