// From statements to recipe.proto's message: resolves names (with did-you-mean), lets protobuf parse each value, and
// remembers where each field was said.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "recipes/error.h"
#include "recipes/statements.h"

namespace dsa::proto {
class Recipe;
}

namespace dsa {

struct Said {
  Location where;      // name's line and column, caret under the value
  std::string origin;  // as in Origin::origin
};
using SaidMap = std::map<std::string, Said>;  // by path

// origin_kind: "base" or "recipe". Repeated fields replace what earlier calls set. `extends` is skipped.
void assign_file(const std::vector<Statement>& statements, const std::string& origin_kind, proto::Recipe& recipe,
                 SaidMap& said, std::vector<Problem>& problems);

// One `path=value` of the command line.
void assign_set(const std::string& assignment, proto::Recipe& recipe, SaidMap& said, std::vector<Problem>& problems);

// The candidate that `name` most likely meant; empty when none is near.
std::string closest(const std::string& name, const std::vector<std::string>& candidates);

}  // namespace dsa
