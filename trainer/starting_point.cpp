#include "trainer/starting_point.h"

#include <filesystem>
#include <sstream>
#include <utility>

#include "data/error.h"
#include "recipes/validate.h"
#include "trainer/checkpoint/manifest.h"
#include "trainer/checkpoint/run_folder.h"

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

// "hidden_size 128, vocab_size 512" of `a` where `b` has other values; the indexer aside.
std::string differing(const ModelConfig& a, const ModelConfig& b) {
  std::ostringstream text;
  const auto compare = [&](const char* name, auto mine, auto other) {
    if (mine != other) text << (text.tellp() > 0 ? ", " : "") << name << ' ' << mine;
  };
  static constexpr std::pair<const char*, int64_t ModelConfig::*> kSizes[] = {
      {"vocab_size", &ModelConfig::vocab_size},
      {"hidden_size", &ModelConfig::hidden_size},
      {"num_hidden_layers", &ModelConfig::num_hidden_layers},
      {"num_nextn_predict_layers", &ModelConfig::num_nextn_predict_layers},
      {"first_k_dense_replace", &ModelConfig::first_k_dense_replace},
      {"num_attention_heads", &ModelConfig::num_attention_heads},
      {"q_lora_rank", &ModelConfig::q_lora_rank},
      {"kv_lora_rank", &ModelConfig::kv_lora_rank},
      {"qk_nope_head_dim", &ModelConfig::qk_nope_head_dim},
      {"qk_rope_head_dim", &ModelConfig::qk_rope_head_dim},
      {"v_head_dim", &ModelConfig::v_head_dim},
      {"intermediate_size", &ModelConfig::intermediate_size},
      {"moe_intermediate_size", &ModelConfig::moe_intermediate_size},
      {"n_routed_experts", &ModelConfig::n_routed_experts},
      {"n_shared_experts", &ModelConfig::n_shared_experts},
      {"num_experts_per_tok", &ModelConfig::num_experts_per_tok},
      {"n_group", &ModelConfig::n_group},
      {"topk_group", &ModelConfig::topk_group}};
  for (const auto& [name, size] : kSizes) compare(name, a.*size, b.*size);
  compare("norm_topk_prob", a.norm_topk_prob, b.norm_topk_prob);
  compare("routed_scaling_factor", a.routed_scaling_factor, b.routed_scaling_factor);
  compare("rms_norm_eps", a.rms_norm_eps, b.rms_norm_eps);
  compare("rope_theta", a.rope.theta, b.rope.theta);
  compare("rope scaling factor", a.rope.yarn ? a.rope.factor : 1, b.rope.yarn ? b.rope.factor : 1);
  return text.str();
}

// The model that the recipe names, from its description alone; nothing when the folder of init.from is gone, which a
// run that has its own checkpoint need not have.
std::optional<ModelConfig> named_model(const Recipe& recipe) {
  if (recipe.init.random) return ModelConfig::from_json_file(recipe.model.config);
  const std::filesystem::path from = recipe.init.from;
  std::error_code gone;
  if (std::filesystem::exists(from / "config.json", gone)) return ModelConfig::from_json_file((from / "config.json").string());
  const std::vector<int64_t> steps = checkpoint_steps(from.string());
  if (steps.empty() && !std::filesystem::exists(from / kManifestFile, gone)) return std::nullopt;
  const CheckpointReader checkpoint(steps.empty() ? from.string() : checkpoint_folder(from.string(), steps.back()));
  return ModelConfig::from_json(checkpoint.state().model_json, checkpoint.path());
}

// The run's own newest checkpoint. Checkpoints of which none is sound are no reason to begin again from nothing.
std::optional<std::string> own_checkpoint(const std::string& folder, Mesh& mesh, std::string& story) {
  std::vector<std::string> skipped;
  auto own = CheckpointReader::newest_valid(folder, mesh.along(Axis::WORLD), &skipped);
  if (!own && !skipped.empty())
    throw InputError("cannot resume the run in " + folder, "none of its checkpoints is sound, the newest: " + skipped[0],
                     "restore one, or remove the folder to begin again");
  for (const std::string& reason : skipped) story += "skipped " + reason + "; ";
  return own;
}

}  // namespace

std::string stage_name(StageKind stage) {
  return stage == StageKind::PRETRAIN ? "pretrain" : stage == StageKind::WARMUP ? "warmup" : "sparse";
}

StartingPoint find_starting_point(const ResolvedRecipe& resolved, Mesh& mesh) {
  const Recipe& recipe = resolved.recipe;
  StartingPoint start;
  const std::optional<std::string> own = own_checkpoint(recipe.run.folder, mesh, start.story);
  const std::string from = own ? *own : recipe.init.from;
  if (!from.empty()) start.source = open_weights(from);
  start.config = start.source ? start.source->config() : ModelConfig::from_json_file(recipe.model.config);
  if (own) {
    start.resume.emplace(*own);
    // Before check_model, whose complaints would puzzle when the checkpoint is of another stage.
    require_equal("the stage", start.resume->state().stage, stage_name(recipe.stage), *start.resume);
    if (const auto named = named_model(recipe)) {
      const std::string there = differing(start.config, *named), here = differing(*named, start.config);
      if (!there.empty()) require_equal("the model", "one of " + there, "one of " + here, *start.resume);
    } else {
      start.story += recipe.init.from + " is gone and not needed; ";
    }
  }
  check_model(resolved, facts(start.config, start.config.indexer.has_value()));
  if (start.source) start.source->check();
  resolve_indexer(recipe, start.config, start.random_indexer);
  start.config.validate(from.empty() ? recipe.model.config : from);

  if (own) {
    start.base_path = start.resume->state().base_path;
    start.base_digest = start.resume->state().base_digest;
    start.story += "resume from " + *own + " (step " + std::to_string(start.resume->state().step) + ")";
    return start;
  }
  start.story += start.source ? "start from " + start.source->describe() : "start from random weights (seed " + std::to_string(recipe.init.seed) + ")";
  if (recipe.stage == StageKind::WARMUP) {
    start.base_path = std::filesystem::absolute(start.source->path()).lexically_normal().string();
    start.base_digest = start.source->digest();
  }
  return start;
}

std::unique_ptr<TokenDataset> open_dataset(const Recipe& recipe, const ModelConfig& config, bool check_ids) {
  std::vector<std::shared_ptr<TokenSource>> sources;
  for (const std::string& path : recipe.data.tokens)
    sources.push_back(open_token_source(path, config.vocab_size, check_ids));
  return std::make_unique<TokenDataset>(sources, recipe.data.sequence_length, recipe.data.seed, recipe.data.document_mask,
                                        TokenDataset::HoldOut{recipe.data.held_out});
}

std::string check_tokenizer(const StartingPoint& start, const TokenDataset& dataset) {
  const std::string data = dataset.tokenizer_sha256(), model = start.source ? start.source->tokenizer_sha256() : "";
  if (!start.source) return "the data's";
  if (data.empty()) return "not compared: the token files do not name theirs";
  if (model.empty()) return "not compared: " + start.source->path() + " has no tokenizer.json";
  if (data != model)
    throw InputError("cannot train " + start.source->path() + " on these tokens",
                     "they were made with the tokenizer of SHA-256 " + data + ", the model's is " + model,
                     "tokenise the text with the model's own tokenizer.json");
  return "the model's own";
}

void check_continues(const CheckpointReader& checkpoint, const Recipe& recipe, const ModelConfig& config,
                     const TokenDataset& dataset) {
  const TrainingState& s = checkpoint.state();
  const ModelConfig saved = ModelConfig::from_json(s.model_json, checkpoint.path());
  if (saved.indexer && config.indexer)
    require_equal("top-k", std::to_string(saved.indexer->top_k), std::to_string(config.indexer->top_k), checkpoint);
  require_equal("the data's digest", s.data_digest, dataset.digest(), checkpoint);
  require_equal("the data seed", std::to_string(s.data_seed), std::to_string(recipe.data.seed), checkpoint);
  require_equal("the sequence length", std::to_string(s.sequence_length), std::to_string(recipe.data.sequence_length), checkpoint);
  require_equal("the number of sequences seen", std::to_string(s.sequences_seen),
                std::to_string(s.step * recipe.batch.sequences), checkpoint);
}

}  // namespace dsa
