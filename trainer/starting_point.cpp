#include "trainer/starting_point.h"

#include <filesystem>

#include "data/error.h"
#include "recipes/validate.h"

namespace dsa {
namespace {

// The indexer of the stage: the checkpoint's, else a new one of the recipe's size.
void resolve_indexer(const Recipe& recipe, ModelConfig& config, bool& is_new) {
  if (recipe.stage == StageKind::PRETRAIN) {
    config.indexer.reset();
    return;
  }
  const Recipe::Model::Indexer& wanted = recipe.model.indexer;
  is_new = !config.indexer;
  if (is_new)
    config.indexer = IndexerConfig{wanted.heads.value_or(kDefaultIndexerHeads),
                                   wanted.head_dim.value_or(kDefaultIndexerHeadDim), kDefaultIndexerTopK};
  if (wanted.top_k) config.indexer->top_k = *wanted.top_k;
}

ModelFacts facts(const ModelConfig& c, bool has_indexer) {
  ModelFacts f;
  f.heads = c.num_attention_heads;
  f.vocab = c.vocab_size;
  f.dense_intermediate = c.first_k_dense_replace > 0 ? c.intermediate_size : 0;
  f.shared_intermediate = c.moe_intermediate_size * c.n_shared_experts;
  f.experts = c.n_routed_experts;
  f.rope_dim = c.qk_rope_head_dim;
  f.max_positions = c.max_position_embeddings;
  f.mtp_layers = c.num_nextn_predict_layers;
  f.has_indexer = has_indexer;
  if (c.indexer) {
    f.indexer_heads = c.indexer->heads;
    f.indexer_head_dim = c.indexer->head_dim;
    f.indexer_top_k = c.indexer->top_k;
  }
  return f;
}

void require_equal(const std::string& what, const std::string& found, const std::string& wanted,
                   const CheckpointReader& checkpoint) {
  if (found != wanted)
    throw InputError("cannot resume from " + checkpoint.path(), what + " there is " + found + ", the recipe's is " + wanted,
                     "restore the recipe, or give the run another run.folder");
}

}  // namespace

std::string stage_name(StageKind stage) {
  return stage == StageKind::PRETRAIN ? "pretrain" : stage == StageKind::WARMUP ? "warmup" : "sparse";
}

StartingPoint find_starting_point(const ResolvedRecipe& resolved, Mesh& mesh) {
  const Recipe& recipe = resolved.recipe;
  StartingPoint start;
  std::vector<std::string> skipped;
  std::optional<std::string> own;
  if (std::filesystem::exists(recipe.run.folder)) own = CheckpointReader::newest_valid(recipe.run.folder, mesh.along(Axis::WORLD), &skipped);
  for (const std::string& reason : skipped) start.story += "skipped " + reason + "; ";

  const std::string from = own ? *own : recipe.init.from;
  if (!from.empty()) start.source = open_weights(from);
  start.config = start.source ? start.source->config() : ModelConfig::from_json_file(recipe.model.config);
  const ModelFacts as_given = facts(start.config, start.config.indexer.has_value());
  if (!own) check_model(resolved, as_given);
  resolve_indexer(recipe, start.config, start.random_indexer);
  start.config.validate(from.empty() ? recipe.model.config : from);

  if (own) {
    start.resume.emplace(*own);
    start.base_path = start.resume->state().base_path;
    start.base_digest = start.resume->state().base_digest;
    start.story += "resume from " + *own + " (step " + std::to_string(start.resume->state().step) + ")";
    return start;
  }
  start.story += start.source ? "start from " + start.source->describe() : "start from random weights (seed " + std::to_string(recipe.init.seed) + ")";
  if (recipe.stage == StageKind::WARMUP) {
    start.base_path = start.source->path();
    start.base_digest = start.source->digest();
  }
  if (recipe.stage == StageKind::SPARSE && start.random_indexer)
    throw InputError("cannot start sparse training from " + from, "it has no indexer, and a random one selects badly",
                     "run the WARMUP stage first and start from its run folder");
  return start;
}

std::unique_ptr<TokenDataset> open_dataset(const Recipe& recipe, const ModelConfig& config, bool check_ids) {
  std::vector<std::shared_ptr<TokenSource>> sources;
  for (const std::string& path : recipe.data.tokens)
    sources.push_back(open_token_source(path, config.vocab_size, check_ids));
  return std::make_unique<TokenDataset>(sources, recipe.data.sequence_length, recipe.data.seed, recipe.data.document_mask,
                                        TokenDataset::HoldOut{recipe.data.held_out});
}

void check_continues(const CheckpointReader& checkpoint, const Recipe& recipe, const ModelConfig& config,
                     const TokenDataset& dataset) {
  const TrainingState& s = checkpoint.state();
  require_equal("the stage", s.stage, stage_name(recipe.stage), checkpoint);
  const ModelConfig saved = ModelConfig::from_json(s.model_json, checkpoint.path());
  require_equal("the model", saved.to_json(saved.format(), HfDtype::BF16), config.to_json(config.format(), HfDtype::BF16),
                checkpoint);
  require_equal("the data's digest", s.data_digest, dataset.digest(), checkpoint);
  require_equal("the data seed", std::to_string(s.data_seed), std::to_string(recipe.data.seed), checkpoint);
  require_equal("the sequence length", std::to_string(s.sequence_length), std::to_string(recipe.data.sequence_length), checkpoint);
  require_equal("the number of sequences seen", std::to_string(s.sequences_seen),
                std::to_string(s.step * recipe.batch.sequences), checkpoint);
}

}  // namespace dsa
