// The shipped recipes resolve, hold the papers' numbers, and recipe.proto's comments tell the truth about defaults.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <regex>

#include "recipes/load.h"
#include "recipes/validate.h"
#include "tests/recipes/recipe_folder.h"

namespace dsa {
namespace {

ResolvedRecipe shipped(const std::string& name) {
  setenv("DSA_BASE", "/models/v31_base", 1);
  setenv("DSA_TOKENS", "/data/tokens.h5", 1);
  return load_recipe(DSA_RECIPES "/" + name + ".textproto");
}

int64_t tokens(const Recipe& r) { return r.schedule.steps * r.batch.sequences * r.data.sequence_length; }

const ModelFacts kV31 = {.heads = 128, .vocab = 129280, .dense_intermediate = 18432, .shared_intermediate = 2048,
                         .experts = 256, .rope_dim = 64, .max_positions = 163840, .mtp_layers = 1};
ModelFacts v32() {
  ModelFacts model = kV31;
  model.has_indexer = true;
  model.indexer_heads = 64;
  model.indexer_head_dim = 128;
  model.indexer_top_k = 2048;
  return model;
}

TEST(ShippedRecipes, AllResolve) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(DSA_RECIPES)) {
    if (entry.path().extension() != ".textproto" || entry.path().stem().string().ends_with("_base")) continue;
    EXPECT_NO_THROW(shipped(entry.path().stem())) << entry.path();
    ++count;
  }
  EXPECT_EQ(count, 11);
}

TEST(ShippedRecipes, WarmupHasTheReportsNumbers) {
  const ResolvedRecipe r = shipped("warmup_671b");
  EXPECT_EQ(r.recipe.stage, StageKind::WARMUP);
  EXPECT_EQ(r.recipe.optimizer.lr, 1e-3);
  EXPECT_EQ(r.recipe.optimizer.indexer_lr, 1e-3);
  EXPECT_EQ(r.recipe.schedule.steps, 1000);
  EXPECT_EQ(r.recipe.schedule.decay, Decay::CONSTANT);
  EXPECT_EQ(tokens(r.recipe), 2'097'152'000);
  EXPECT_EQ(r.recipe.model.indexer.heads, 64);
  EXPECT_EQ(r.recipe.model.indexer.head_dim, 128);
  EXPECT_EQ(r.recipe.model.indexer.top_k, 2048);
  EXPECT_NO_THROW(check_world(r, 128));
  EXPECT_NO_THROW(check_model(r, kV31));
}

TEST(ShippedRecipes, SparseHasTheReportsNumbers) {
  const ResolvedRecipe r = shipped("sparse_671b");
  EXPECT_EQ(r.recipe.stage, StageKind::SPARSE);
  EXPECT_EQ(r.recipe.optimizer.lr, 7.3e-6);
  EXPECT_EQ(r.recipe.optimizer.indexer_lr, 7.3e-6);
  EXPECT_EQ(r.recipe.schedule.steps, 15000);
  EXPECT_EQ(tokens(r.recipe), 943'718'400'000);
  EXPECT_EQ(r.recipe.init.from, shipped("warmup_671b").recipe.run.folder);
  EXPECT_NO_THROW(check_world(r, 512));
  EXPECT_NO_THROW(check_model(r, v32()));
}

TEST(ShippedRecipes, ShortConversionHasGlm5sNumbers) {
  const Recipe warmup = shipped("warmup_671b_glm5").recipe;
  EXPECT_EQ(warmup.optimizer.lr, 5e-3);
  EXPECT_EQ(warmup.schedule.final_lr, 2e-4);
  EXPECT_EQ(warmup.schedule.steps, 1000);
  const Recipe sparse = shipped("sparse_671b_20b").recipe;
  EXPECT_EQ(sparse.optimizer.lr, 1e-5);
  EXPECT_EQ(sparse.schedule.decay, Decay::CONSTANT);
  EXPECT_NEAR(static_cast<double>(tokens(sparse)), 20e9, 0.001 * 20e9);
  EXPECT_EQ(sparse.init.from, warmup.run.folder);
}

TEST(ShippedRecipes, PretrainingHasV3sNumbers) {
  const ResolvedRecipe r = shipped("pretrain_128k");
  EXPECT_EQ(r.recipe.stage, StageKind::PRETRAIN);
  EXPECT_EQ(tokens(r.recipe), 62'914'560'000);
  EXPECT_EQ(r.recipe.optimizer.lr, 7.3e-6);
  EXPECT_NO_THROW(check_world(r, 512));
  EXPECT_NO_THROW(check_model(r, kV31));
  const auto random = load_recipe(DSA_RECIPES "/pretrain_128k.textproto",
                                  {"init.from=", "init.random=true", "model.config=" DSA_RECIPES "/config_671b_v3.1.json"});
  EXPECT_TRUE(random.recipe.init.random);
}

TEST(ShippedRecipes, TinyStagesFollowOneAnother) {
  const ResolvedRecipe pretrain = shipped("tiny_pretrain"), warmup = shipped("tiny_warmup"), sparse = shipped("tiny_sparse");
  EXPECT_TRUE(pretrain.recipe.model.config.ends_with("recipes/tiny_config.json"));
  EXPECT_EQ(warmup.recipe.init.from, "runs/tiny/v31");
  EXPECT_EQ(sparse.recipe.init.from, warmup.recipe.run.folder);
  const ModelFacts model = {.heads = 4, .vocab = 258, .dense_intermediate = 384, .shared_intermediate = 64,
                            .experts = 8, .rope_dim = 16, .max_positions = 163840, .mtp_layers = 1};
  for (const ResolvedRecipe* r : {&pretrain, &warmup}) {
    EXPECT_NO_THROW(check_world(*r, 1));
    EXPECT_NO_THROW(check_world(*r, 2));
    EXPECT_NO_THROW(check_model(*r, model));
    EXPECT_EQ(r->recipe.batch.sequences * r->recipe.data.sequence_length, 4096);
  }
  EXPECT_LT(*sparse.recipe.model.indexer.top_k, sparse.recipe.data.sequence_length);
}

TEST(ShippedRecipes, SmallGpuStagesFollowOneAnother) {
  const ResolvedRecipe pretrain = shipped("small_gpu_pretrain"), warmup = shipped("small_gpu_warmup"),
                       sparse = shipped("small_gpu_sparse");
  EXPECT_EQ(warmup.recipe.init.from, "runs/small_gpu/v31");
  EXPECT_EQ(sparse.recipe.init.from, warmup.recipe.run.folder);
  ModelFacts model = {.heads = 16, .vocab = 129280, .dense_intermediate = 2304, .shared_intermediate = 384,
                      .experts = 16, .rope_dim = 64, .max_positions = 163840, .mtp_layers = 1};
  EXPECT_NO_THROW(check_model(pretrain, model));
  EXPECT_NO_THROW(check_model(warmup, model));
  for (const ResolvedRecipe* r : {&pretrain, &warmup, &sparse}) EXPECT_NO_THROW(check_world(*r, 1));
  EXPECT_LE(8 * *sparse.recipe.model.indexer.top_k, sparse.recipe.data.sequence_length);
}

TEST(Schema, CommentsStateTheDefaultsOfTheStruct) {
  const RecipeFolder folder;
  folder.write("good.textproto", kGood);
  const ResolvedRecipe resolved = load_recipe("good.textproto");
  // Block names in recipe.proto -> paths.
  const std::map<std::string, std::string> blocks = {
      {"Recipe", ""}, {"Model", "model."}, {"Indexer", "model.indexer."}, {"Init", "init."}, {"Data", "data."},
      {"Batch", "batch."}, {"Optimizer", "optimizer."}, {"Schedule", "schedule."}, {"Loss", "loss."},
      {"Parallel", "parallel."}, {"Compute", "compute."}, {"Checkpoint", "checkpoint."}, {"Run", "run."}};
  const std::regex message(R"(^message (\w+) \{)"), field(R"(^  (?:optional|repeated) (\w+) (\w+) = \d+;)"),
      stated(R"(Default: (-?\d+(?:\.\d+)?(?:e-?\d+)?|true|false|[A-Z_0-9]+)(?:\.| \[|$|[ :]))");
  std::ifstream file(DSA_RECIPES "/recipe.proto");
  std::string prefix, comment;
  int compared = 0;
  for (std::string line; std::getline(file, line);) {
    std::smatch match;
    if (std::regex_search(line, match, message)) prefix = blocks.at(match[1]);
    if (line.starts_with("  //")) {
      comment += line.substr(4);
    } else if (std::regex_search(line, match, field)) {
      const std::string path = prefix + match[2].str(), type = match[1];
      const bool block = blocks.contains(type);
      EXPECT_TRUE(block || comment.find("Default:") != std::string::npos || comment.find("Required") != std::string::npos) << path;
      if (std::regex_search(comment, match, stated)) {
        EXPECT_EQ(match[1].str(), resolved.origin(path).value) << path;
        ++compared;
      }
      comment.clear();
    } else {
      comment.clear();
    }
  }
  EXPECT_GE(compared, 28);
}

}  // namespace
}  // namespace dsa
