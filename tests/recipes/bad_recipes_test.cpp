// Every case of golden/recipes_bad/cases.txt is refused with exactly the message written there.
#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "recipes/load.h"
#include "tests/recipes/recipe_folder.h"

namespace dsa {
namespace {

struct Case {
  std::string name;
  std::vector<std::string> sets;
  std::string recipe, expected;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

// === NAME / --- set PATH=VALUE / --- recipe / text / --- expected / text
std::vector<Case> read_cases() {
  std::vector<Case> cases;
  std::ifstream file(DSA_GOLDEN "/recipes_bad/cases.txt", std::ios::binary);
  std::string* into = nullptr;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("=== ")) {
      cases.push_back({line.substr(4), {}, "", ""});
    } else if (line.starts_with("--- set ")) {
      cases.back().sets.push_back(line.substr(8));
    } else if (line == "--- recipe") {
      into = &cases.back().recipe;
    } else if (line == "--- expected") {
      into = &cases.back().expected;
    } else {
      *into += line + "\n";
    }
  }
  return cases;
}

class BadRecipe : public testing::TestWithParam<Case> {};

TEST_P(BadRecipe, IsRefusedWithThisMessage) {
  unsetenv("DSA_TEST_UNSET");
  const RecipeFolder folder;
  for (const auto& entry : std::filesystem::directory_iterator(DSA_GOLDEN "/recipes_bad")) {
    if (entry.path().extension() == ".textproto") std::filesystem::copy(entry.path(), ".");
  }
  folder.write("run.textproto", GetParam().recipe);
  try {
    load_recipe("run.textproto", GetParam().sets);
    FAIL() << "accepted";
  } catch (const RecipeError& error) {
    EXPECT_EQ(error.what() + std::string("\n"), GetParam().expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, BadRecipe, testing::ValuesIn(read_cases()),
                         [](const auto& info) { return info.param.name; });

TEST(BadRecipes, AreManyAndDistinct) {
  const std::vector<Case> cases = read_cases();
  EXPECT_GE(cases.size(), 60u);
  std::set<std::string> recipes;
  for (const Case& c : cases) recipes.insert(c.recipe + (c.sets.empty() ? "" : c.sets[0]));
  EXPECT_EQ(recipes.size(), cases.size());
}

}  // namespace
}  // namespace dsa
