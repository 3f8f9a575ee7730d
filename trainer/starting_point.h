// Where a run begins: from its own newest checkpoint, from another checkpoint, or from random weights; and the model
// that follows. Everything is checked before any work: world, model, weights, data, folders.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "data/token_dataset.h"
#include "parallel/mesh.h"
#include "recipes/load.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/weight_source.h"

namespace dsa {

struct StartingPoint {
  ModelConfig config;                          // with the indexer of the stage, without one in PRETRAIN
  std::shared_ptr<const WeightSource> source;  // null: random weights
  bool random_indexer = false;                 // the source has none
  std::optional<CheckpointReader> resume;      // the run's own newest checkpoint
  std::string base_path, base_digest;          // WARMUP: what holds the frozen backbone (an absolute path)
  std::string story;                           // one line: what was chosen and why
};

// Collective. Throws RecipeError, InputError.
StartingPoint find_starting_point(const ResolvedRecipe& recipe, Mesh& mesh);

// Opens the token files and checks them against the model's vocabulary; with check_ids reads every id once.
std::unique_ptr<TokenDataset> open_dataset(const Recipe& recipe, const ModelConfig& config, bool check_ids);

// Refuses tokens that were made with another tokenizer than the model's; returns one line on what was compared.
std::string check_tokenizer(const StartingPoint& start, const TokenDataset& dataset);

// Refuses a checkpoint that this recipe cannot continue: another stage, top-k, data, seed, length or batch.
void check_continues(const CheckpointReader& checkpoint, const Recipe& recipe, const ModelConfig& config,
                     const TokenDataset& dataset);

// The run's name for a stage: "pretrain", "warmup", "sparse".
std::string stage_name(StageKind stage);

}  // namespace dsa
