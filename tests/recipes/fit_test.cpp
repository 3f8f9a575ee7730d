// The recipe against the ranks and against the model.
#include <gtest/gtest.h>

#include "recipes/validate.h"
#include "tests/recipes/recipe_folder.h"

namespace dsa {
namespace {

class Fit : public testing::Test {
 protected:
  Fit() { folder_.write("run.textproto", kGood); }
  ResolvedRecipe recipe(std::vector<std::string> sets = {}) const { return load_recipe("run.textproto", sets); }

  std::string world_error(int64_t world, std::vector<std::string> sets) const {
    try {
      check_world(recipe(sets), world);
    } catch (const RecipeError& error) {
      return error.what();
    }
    return "fits";
  }
  std::string model_error(const ModelFacts& model, std::vector<std::string> sets = {}) const {
    sets.insert(sets.begin(), "model.indexer.top_k=64");
    try {
      check_model(recipe(sets), model);
    } catch (const RecipeError& error) {
      return error.what();
    }
    return "fits";
  }
  const RecipeFolder folder_;
  const ModelFacts model_ = {.heads = 8, .vocab = 512, .dense_intermediate = 192, .shared_intermediate = 64, .experts = 8,
                             .rope_dim = 8, .max_positions = 163840, .mtp_layers = 1};
};

TEST_F(Fit, LegalWorlds) {
  EXPECT_EQ(world_error(1, {}), "fits");
  EXPECT_EQ(world_error(8, {}), "fits");
  EXPECT_EQ(world_error(4, {"parallel.tensor=2", "parallel.context=2", "parallel.expert=2"}), "fits");
  EXPECT_EQ(world_error(8, {"parallel.tensor=2", "parallel.expert=8", "batch.micro_sequences=2"}), "fits");
}

// Every (tensor, context, expert, world) up to 8: accepted exactly when the plain rule says so.
TEST_F(Fit, AgreesWithThePlainRule) {
  const ResolvedRecipe base = recipe();
  for (int64_t world = 1; world <= 8; ++world) {
    for (int64_t tensor = 1; tensor <= 8; tensor *= 2) {
      for (int64_t context = 1; context <= 4; ++context) {
        for (int64_t expert = 1; expert <= 8; ++expert) {
          ResolvedRecipe r = base;
          r.recipe.parallel = {tensor, context, expert};
          const int64_t data = world / (tensor * context);
          const bool legal = data * tensor * context == world && data > 0 && world % expert == 0 && 8 % data == 0;
          bool accepted = true;
          try {
            check_world(r, world);
          } catch (const RecipeError&) {
            accepted = false;
          }
          EXPECT_EQ(accepted, legal) << world << " " << tensor << " " << context << " " << expert;
        }
      }
    }
  }
}

TEST_F(Fit, WorldThatTheMeshDoesNotDivide) {
  EXPECT_EQ(world_error(6, {"parallel.tensor=4"}),
            "--set: error: parallel.tensor=4 x parallel.context=1 does not divide the 6 ranks of this run\n"
            "       | parallel.tensor=4\n"
            "       |                 ^ legal products: 1, 2, 3, 6; or start a multiple of 4 ranks\n"
            "1 error. Nothing was launched. (exit 2)");
}

TEST_F(Fit, AllProblemsAtOnceAndTheFilesLine) {
  EXPECT_EQ(world_error(3, {"parallel.expert=2"}),
            "--set: error: parallel.expert=2 does not divide the 3 ranks of this run\n"
            "       | parallel.expert=2\n"
            "       |                 ^ legal: 1, 3\n"
            "run.textproto:4:9: error: batch.sequences=8 does not split over 3 data ranks x micro_sequences 1\n"
            "     4 | batch { sequences: 8 }\n"
            "       |                    ^ use a multiple of 3\n"
            "2 errors. Nothing was launched. (exit 2)");
}

TEST_F(Fit, ModelsThatFit) {
  EXPECT_EQ(model_error(model_), "fits");
  EXPECT_EQ(model_error(model_, {"parallel.tensor=8", "parallel.expert=8"}), "fits");
  EXPECT_EQ(model_error({}), "fits") << "facts left out are not checked";
}

TEST_F(Fit, TensorNamesWhatItDoesNotDivide) {
  EXPECT_EQ(model_error(model_, {"parallel.tensor=16", "parallel.expert=3"}),
            "--set: error: parallel.tensor=16 does not divide the model's num_attention_heads=8\n"
            "       | parallel.tensor=16\n"
            "       |                 ^^ legal: 1, 2, 4, 8\n"
            "--set: error: parallel.expert=3 does not divide the model's n_routed_experts=8\n"
            "       | parallel.expert=3\n"
            "       |                 ^ legal: 1, 2, 4, 8\n"
            "2 errors. Nothing was launched. (exit 2)");
  ModelFacts odd = model_;
  odd.vocab = 258;
  EXPECT_NE(model_error(odd, {"parallel.tensor=4"}).find("vocab_size=258"), std::string::npos);
}

TEST_F(Fit, ExpertsOfADenseModel) {
  ModelFacts dense = model_;
  dense.experts = 0;
  EXPECT_EQ(model_error(dense), "fits");
  EXPECT_NE(model_error(dense, {"parallel.expert=2"}).find("the model has no routed experts"), std::string::npos);
}

TEST_F(Fit, SequencesBeyondThePositions) {
  EXPECT_NE(model_error(model_, {"data.sequence_length=163841"}).find("exceeds the model's max_position_embeddings=163840"),
            std::string::npos);
}

TEST_F(Fit, SparseNeedsAnIndexer) {
  EXPECT_NE(model_error(model_, {"stage=SPARSE"}).find("stage SPARSE needs an indexer"), std::string::npos);
  ModelFacts with = model_;
  with.has_indexer = true;
  with.indexer_heads = 4;
  with.indexer_head_dim = 16;
  with.indexer_top_k = 600;
  EXPECT_EQ(model_error(with, {"stage=SPARSE"}), "fits") << "the recipe's top_k wins";
  EXPECT_EQ(model_error(with, {"stage=SPARSE", "model.indexer.heads=4"}), "fits");
  EXPECT_NE(model_error(with, {"stage=SPARSE", "model.indexer.heads=8"}).find("the checkpoint's indexer has 4"), std::string::npos);
  EXPECT_THROW(check_model(recipe({"stage=SPARSE"}), with), RecipeError) << "the checkpoint's k=600 covers all 512 keys";
}

TEST_F(Fit, TopKMustLeaveSomethingOut) {
  EXPECT_EQ(model_error(model_, {"model.indexer.top_k=511"}), "fits");
  EXPECT_NE(model_error(model_, {"model.indexer.top_k=512"}).find("top_k=512 is not below data.sequence_length=512"),
            std::string::npos);
  EXPECT_THROW(check_model(recipe(), model_), RecipeError) << "the default, 2048, covers all 512 keys";
}

TEST_F(Fit, HeadDimAndHadamard) {
  EXPECT_NE(model_error(model_, {"model.indexer.head_dim=4"}).find("below the model's qk_rope_head_dim=8"), std::string::npos);
  EXPECT_NE(model_error(model_, {"model.indexer.head_dim=48", "model.indexer.hadamard=true"}).find("power of two"),
            std::string::npos);
  EXPECT_EQ(model_error(model_, {"model.indexer.head_dim=64", "model.indexer.hadamard=true"}), "fits");
}

TEST_F(Fit, MtpWeightWithoutMtpLayer) {
  ModelFacts without = model_;
  without.mtp_layers = 0;
  ModelFacts sparse = without;
  sparse.has_indexer = true;
  sparse.indexer_heads = 4;
  sparse.indexer_head_dim = 16;
  EXPECT_NE(model_error(sparse, {"stage=SPARSE", "loss.mtp_weight=0.3"}).find("the model has no MTP layer"), std::string::npos);
  EXPECT_EQ(model_error(sparse, {"stage=SPARSE"}), "fits");
}

}  // namespace
}  // namespace dsa
