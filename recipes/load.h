// From recipe files and `--set path=value` to a Recipe. Throws RecipeError with every problem found.
//
//   extends: "base.textproto"    relative to the file that says it; at most 8 deep. What the file says itself wins:
//                                scalars override, repeated fields replace, messages merge field by field.
//   --set optimizer.lr=1e-4      after the files; of two for the same field the later one wins. Strings need no quotes.
//   "${NAME:?}"                  in path fields only: the environment's NAME, which must be set and not empty.
//
// Relative paths stay as they are (relative to the current folder), except model.config, which is looked up beside
// the file that says it first. A file is at most 1 MiB, messages nest at most 100 deep.
#pragma once

#include <string>
#include <vector>

#include "recipes/error.h"
#include "recipes/recipe.h"

namespace dsa {

struct Origin {
  std::string path;    // "optimizer.lr"
  std::string value;   // in text format: `1e-3`, `"runs/tiny"`, `["a.h5", "b.h5"]`; empty: left to the checkpoint
  std::string origin;  // `default`, `base FILE:LINE`, `recipe FILE:LINE`, `command line`
  Location where;      // file empty: default
};

struct ResolvedRecipe {
  Recipe recipe;
  std::vector<Origin> values;  // every field, in the order of recipe.proto
  std::string text;            // canonical text form of all values; loads to the same Recipe
  std::string digest;          // XXH3-128 of text, 32 hexadecimal digits
  std::string file;            // the recipe's path as given

  const Origin& origin(const std::string& path) const;  // throws std::out_of_range for an unknown path
  bool is_set(const std::string& path) const;            // said by a file or the command line
};

// sets: `path=value` each.
ResolvedRecipe load_recipe(const std::string& path, const std::vector<std::string>& sets = {});

}  // namespace dsa
