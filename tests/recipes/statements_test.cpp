// Hostile text: deep nesting, huge files, random bytes. None may crash, hang or be accepted.
#include <gtest/gtest.h>

#include <random>

#include "recipes/load.h"
#include "recipes/spelling.h"
#include "recipes/statements.h"
#include "tests/recipes/recipe_folder.h"

namespace dsa {
namespace {

std::string error_of(const std::string& path) {
  try {
    load_recipe(path);
  } catch (const RecipeError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(HostileRecipe, NestingOfAHundredThousandIsAnError) {
  const RecipeFolder folder;
  std::string text;
  for (int i = 0; i < 100'000; ++i) text += "model{";
  folder.write("deep.textproto", text);
  EXPECT_NE(error_of("deep.textproto").find(":1:606: error: nested more than 100 deep"), std::string::npos)
      << error_of("deep.textproto").substr(0, 200);
}

TEST(HostileRecipe, TwoMebibytesAreRefused) {
  const RecipeFolder folder;
  folder.write("big.textproto", kGood + std::string(2 << 20, '#'));
  EXPECT_NE(error_of("big.textproto").find("error: big.textproto is larger than 1 MiB"), std::string::npos);
}

TEST(HostileRecipe, OneMebibyteIsRead) {
  const RecipeFolder folder;
  folder.write("big.textproto", kGood + std::string((1 << 20) - kGood.size(), '#'));
  EXPECT_EQ(error_of("big.textproto"), "accepted");
}

TEST(HostileRecipe, FoldersAndMissingFilesAreNamed) {
  const RecipeFolder folder;
  std::filesystem::create_directory("folder");
  EXPECT_NE(error_of("folder").find("folder is a folder, not a recipe"), std::string::npos);
  EXPECT_NE(error_of("nowhere").find("cannot read nowhere (No such file or directory)"), std::string::npos);
  EXPECT_NE(error_of(std::string(5000, 'x')).find("(File name too long)"), std::string::npos);
}

// One byte changed, dropped or added anywhere in a good recipe: read or refused, never a crash.
TEST(HostileRecipe, MutationsNeverCrash) {
  const RecipeFolder folder;
  std::mt19937 random(7);
  int refused = 0;
  for (int i = 0; i < 600; ++i) {
    std::string text = kGood;
    for (int edit = 0; edit < 3; ++edit) {
      const size_t at = random() % text.size();
      const char byte = static_cast<char>(random() % 256);
      switch (random() % 3) {
        case 0: text[at] = byte; break;
        case 1: text.erase(at, 1); break;
        default: text.insert(at, 1, byte);
      }
    }
    folder.write("run.textproto", text);
    const std::string error = error_of("run.textproto");
    if (error == "accepted") continue;
    ++refused;
    EXPECT_TRUE(error.ends_with("Nothing was launched. (exit 2)"));
  }
  EXPECT_GT(refused, 200);
}

TEST(Statements, OutlineHasNamesValuesAndPlaces) {
  std::vector<Problem> problems;
  const auto outline = scan_file("a: -1 # note\nb {\n\tc: ['x' \"y\", z];\n}\n", "f", problems);
  ASSERT_TRUE(problems.empty());
  ASSERT_EQ(outline.size(), 2u);
  EXPECT_EQ(outline[0].values[0].text, "-1");
  EXPECT_EQ(outline[1].kind, Statement::Kind::MESSAGE);
  const Statement& c = outline[1].children[0];
  EXPECT_EQ(c.kind, Statement::Kind::LIST);
  ASSERT_EQ(c.values.size(), 2u);
  EXPECT_EQ(c.values[0].text, "'x' \"y\"");
  EXPECT_EQ(c.values[1].text, "z");
  EXPECT_EQ(c.where.line, 3);
  EXPECT_EQ(c.where.column, 2);
  EXPECT_EQ(c.values[1].where.caret_column, 15);
}

TEST(Spelling, NearestWithinAThirdOfTheLength) {
  const std::vector<std::string> names = {"steps", "warmup_steps", "decay"};
  EXPECT_EQ(closest("stesp", names), "steps");
  EXPECT_EQ(closest("STEPS", names), "steps");
  EXPECT_EQ(closest("warmup_stepz", names), "warmup_steps");
  EXPECT_EQ(closest("decade", names), "decay");
  EXPECT_EQ(closest("momentum", names), "");
  EXPECT_EQ(closest(std::string(10'000, 'a'), names), "");
}

}  // namespace
}  // namespace dsa
