// Rules of extends, --set, paths and origins; the canonical text.
#include <gtest/gtest.h>

#include <algorithm>

#include "recipes/load.h"
#include "tests/recipes/recipe_folder.h"

namespace dsa {
namespace {

class LoadRecipe : public testing::Test {
 protected:
  LoadRecipe() { folder_.write("good.textproto", kGood); }
  const RecipeFolder folder_;
};

TEST_F(LoadRecipe, DefaultsAreThoseOfTheStruct) {
  const Recipe r = load_recipe("good.textproto").recipe;
  const Recipe d;
  EXPECT_EQ(r.stage, StageKind::WARMUP);
  EXPECT_EQ(r.optimizer.eps, 1e-20);
  EXPECT_EQ(r.optimizer.beta1, 0.9);
  EXPECT_EQ(r.optimizer.beta2, 0.95);
  EXPECT_EQ(r.optimizer.weight_decay, 0.1);
  EXPECT_EQ(r.optimizer.clip, 1.0);
  EXPECT_EQ(r.loss.mtp_hidden, MtpHidden::POST_NORM);
  EXPECT_EQ(r.compute.precision, d.compute.precision);
  EXPECT_EQ(r.compute.recompute, d.compute.recompute);
  EXPECT_EQ(r.init.seed, d.init.seed);
  EXPECT_EQ(r.checkpoint.keep, d.checkpoint.keep);
  EXPECT_FALSE(r.model.indexer.top_k.has_value());
}

TEST_F(LoadRecipe, ValuesThatFollowFromOthers) {
  const Recipe r = load_recipe("good.textproto", {"data.held_out=12", "optimizer.lr=0.5"}).recipe;
  EXPECT_EQ(r.optimizer.indexer_lr, 0.5);
  EXPECT_EQ(r.schedule.final_lr, 0.5);
  EXPECT_EQ(r.run.eval_sequences, 12);
}

TEST_F(LoadRecipe, ScalarsOverrideAndBlocksMerge) {
  folder_.write("child.textproto", "extends: 'good.textproto' optimizer { clip: 0.5 } schedule { steps: 3 }");
  const ResolvedRecipe r = load_recipe("child.textproto");
  EXPECT_EQ(r.recipe.optimizer.clip, 0.5);
  EXPECT_EQ(r.recipe.optimizer.lr, 1e-3);
  EXPECT_EQ(r.recipe.schedule.steps, 3);
  EXPECT_EQ(r.origin("optimizer.clip").origin, "recipe child.textproto:1");
  EXPECT_EQ(r.origin("optimizer.lr").origin, "base good.textproto:5");
  EXPECT_EQ(r.origin("optimizer.eps").origin, "default");
}

TEST_F(LoadRecipe, WhereExtendsStandsDoesNotMatter) {
  folder_.write("child.textproto", "schedule { steps: 3 }\nextends: 'good.textproto'\n");
  EXPECT_EQ(load_recipe("child.textproto").recipe.schedule.steps, 3);
}

TEST_F(LoadRecipe, OverridingWithZeroIsNotSilence) {
  folder_.write("child.textproto", "extends: 'good.textproto' optimizer { weight_decay: 0 eps: 0 clip: 0 }");
  const Recipe r = load_recipe("child.textproto").recipe;
  EXPECT_EQ(r.optimizer.weight_decay, 0);
  EXPECT_EQ(r.optimizer.eps, 0);
  EXPECT_EQ(r.optimizer.clip, 0);
}

TEST_F(LoadRecipe, RepeatedFieldsReplaceTheBase) {
  folder_.write("child.textproto", "extends: 'good.textproto' data { tokens: 'b.h5' tokens: 'c.h5' }");
  folder_.write("grand.textproto", "extends: 'child.textproto' data { tokens: ['d.h5', 'e.h5'] tokens: 'f.h5' }");
  using Paths = std::vector<std::string>;
  EXPECT_EQ(load_recipe("child.textproto").recipe.data.tokens, (Paths{"b.h5", "c.h5"}));
  EXPECT_EQ(load_recipe("grand.textproto").recipe.data.tokens, (Paths{"d.h5", "e.h5", "f.h5"}));
  EXPECT_EQ(load_recipe("grand.textproto", {"data.tokens=g.h5"}).recipe.data.tokens, (Paths{"g.h5"}));
  EXPECT_EQ(load_recipe("grand.textproto", {"data.tokens=[\"g.h5\", 'h.h5']"}).recipe.data.tokens, (Paths{"g.h5", "h.h5"}));
}

TEST_F(LoadRecipe, ExtendsIsRelativeToTheFileThatSaysIt) {
  folder_.write("a/base.textproto", "extends: '../good.textproto' schedule { steps: 5 }");
  folder_.write("b/child.textproto", "extends: '../a/base.textproto'");
  const ResolvedRecipe r = load_recipe("b/child.textproto");
  EXPECT_EQ(r.recipe.schedule.steps, 5);
  EXPECT_EQ(r.origin("schedule.steps").origin, "base a/base.textproto:1");
  EXPECT_EQ(r.origin("batch.sequences").origin, "base good.textproto:4");
}

TEST_F(LoadRecipe, EightFilesMayExtendOneAnother) {
  folder_.write("link_1.textproto", kGood);
  for (int i = 2; i <= 8; ++i) {
    folder_.write("link_" + std::to_string(i) + ".textproto", "extends: 'link_" + std::to_string(i - 1) + ".textproto'");
  }
  folder_.write("link_9.textproto", "extends: 'link_8.textproto'");
  EXPECT_NO_THROW(load_recipe("link_8.textproto"));
  EXPECT_THROW(load_recipe("link_9.textproto"), RecipeError);
}

TEST_F(LoadRecipe, SetWinsAndTheLastOneCounts) {
  const ResolvedRecipe r = load_recipe("good.textproto", {"schedule.steps=3", "stage=SPARSE", "schedule.steps=4"});
  EXPECT_EQ(r.recipe.schedule.steps, 4);
  EXPECT_EQ(r.recipe.stage, StageKind::SPARSE);
  EXPECT_EQ(r.origin("schedule.steps").origin, "command line");
}

TEST_F(LoadRecipe, SetTakesStringsWithAndWithoutQuotes) {
  const auto folder = [](const std::string& set) { return load_recipe("good.textproto", {set}).recipe.run.folder; };
  EXPECT_EQ(folder("run.folder=runs/b"), "runs/b");
  EXPECT_EQ(folder("run.folder=\"runs/b\""), "runs/b");
  EXPECT_EQ(folder("run.folder='a' \"b\""), "ab");
  EXPECT_EQ(folder("run.folder=with = \"signs\" and \\ back"), "with = \"signs\" and \\ back");
  EXPECT_EQ(folder("run.folder=läufe"), "läufe");
}

TEST_F(LoadRecipe, SetMayCompleteAnIncompleteRecipe) {
  folder_.write("part.textproto", "extends: 'good.textproto' init { from: '' }");
  EXPECT_THROW(load_recipe("part.textproto"), RecipeError);
  EXPECT_EQ(load_recipe("part.textproto", {"init.from=v32"}).recipe.init.from, "v32");
}

TEST_F(LoadRecipe, EnvironmentInPathFields) {
  setenv("DSA_TEST_ROOT", "/data", 1);
  folder_.write("env.textproto",
                "extends: 'good.textproto' data { tokens: '${DSA_TEST_ROOT:?}/a.h5' } run { folder: "
                "'x/${DSA_TEST_ROOT:?the disk}${DSA_TEST_ROOT:?}' }");
  const ResolvedRecipe r = load_recipe("env.textproto");
  EXPECT_EQ(r.recipe.data.tokens[0], "/data/a.h5");
  EXPECT_EQ(r.recipe.run.folder, "x//data/data");
  setenv("DSA_TEST_ROOT", "", 1);
  EXPECT_THROW(load_recipe("env.textproto"), RecipeError);
  unsetenv("DSA_TEST_ROOT");
  EXPECT_NO_THROW(load_recipe("env.textproto", {"data.tokens=a", "run.folder=b"})) << "what is overridden needs no environment";
}

TEST_F(LoadRecipe, ConfigIsSoughtBesideTheFileThatSaysItThenHere) {
  folder_.write("sub/base.textproto", "model { config: 'config.json' } init { from: '' random: true }");
  folder_.write("run.textproto", "extends: 'sub/base.textproto' " +
                                     kGood.substr(0, kGood.find("init")) + kGood.substr(kGood.find("data")));
  const auto config = [](std::vector<std::string> sets) {
    sets.push_back("stage=PRETRAIN");
    return load_recipe("run.textproto", sets).recipe.model.config;
  };
  EXPECT_THROW(config({}), RecipeError);
  folder_.write("config.json", "{}");
  EXPECT_EQ(config({}), "config.json");
  folder_.write("sub/config.json", "{}");
  EXPECT_EQ(config({}), "sub/config.json");
  EXPECT_EQ(config({"model.config=config.json"}), "config.json");
}

TEST_F(LoadRecipe, CanonicalTextLoadsToTheSame) {
  folder_.write("child.textproto",
                "extends: 'good.textproto' optimizer { lr: 7.3e-6 indexer_lr: 0.1 } init { seed: 18446744073709551615 } "
                "model { indexer { top_k: 64 hadamard: true } } compute { precision: FP64 recompute: NONE } "
                "data { tokens: 'b\\n\"ü.h5' }");
  const ResolvedRecipe first = load_recipe("child.textproto");
  folder_.write("again.textproto", first.text);
  const ResolvedRecipe again = load_recipe("again.textproto");
  EXPECT_EQ(again.text, first.text);
  EXPECT_EQ(again.digest, first.digest);
  EXPECT_EQ(again.recipe.optimizer.lr, 7.3e-6);
  EXPECT_EQ(again.recipe.init.seed, 18446744073709551615ull);
  EXPECT_EQ(again.recipe.data.tokens[0], "b\n\"ü.h5");
  EXPECT_EQ(again.recipe.compute.precision, Precision::FP64);
  EXPECT_FALSE(again.recipe.model.indexer.heads.has_value());
}

TEST_F(LoadRecipe, DigestTellsValuesApartNotSpellings) {
  const std::string digest = load_recipe("good.textproto").digest;
  EXPECT_EQ(digest.size(), 32u);
  folder_.write("spelt.textproto", "# another spelling\n" + kGood + "optimizer_: 1");
  folder_.write("same.textproto", "# note\nextends: 'good.textproto' optimizer { lr: 0.001 clip: 1.0 }");
  EXPECT_EQ(load_recipe("same.textproto").digest, digest);
  EXPECT_NE(load_recipe("same.textproto", {"optimizer.lr=0.00100000001"}).digest, digest);
}

TEST_F(LoadRecipe, EveryFieldIsListedOnceWithItsOrigin) {
  const ResolvedRecipe r = load_recipe("good.textproto");
  std::vector<std::string> paths;
  for (const Origin& value : r.values) paths.push_back(value.path);
  EXPECT_EQ(paths.size(), 52u);
  std::sort(paths.begin(), paths.end());
  EXPECT_EQ(std::adjacent_find(paths.begin(), paths.end()), paths.end());
  EXPECT_EQ(r.origin("data.tokens").value, "[\"a.h5\"]");
  EXPECT_EQ(r.origin("stage").value, "WARMUP");
  EXPECT_EQ(r.origin("optimizer.eps").value, "1e-20");
  EXPECT_EQ(r.origin("model.indexer.top_k").value, "");
  EXPECT_TRUE(r.is_set("stage"));
  EXPECT_FALSE(r.is_set("optimizer.eps"));
  EXPECT_THROW(r.origin("optimizer.lrr"), std::out_of_range);
}

}  // namespace
}  // namespace dsa
