// From statements to recipe.proto's message: resolves names (with did-you-mean), lets protobuf parse each value, and
// remembers where each field was said.
#pragma once

#include <map>
#include <optional>
#include <set>
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
struct Assigned {
  std::map<std::string, Said> said;  // by path
  std::set<std::string> unread;      // paths whose value could not be read
};

// origin_kind: "base" or "recipe". Repeated fields replace what earlier calls set. `extends` is skipped.
void assign_file(const std::vector<Statement>& statements, const std::string& origin_kind, proto::Recipe& recipe,
                 Assigned& assigned, std::vector<Problem>& problems);

// One `path=value` of the command line.
void assign_set(const std::string& assignment, proto::Recipe& recipe, Assigned& assigned,
                std::vector<Problem>& problems);

// The string that a value writes, quotes and escapes resolved; empty when it is not a string.
std::optional<std::string> parse_string(const RawValue& value);

}  // namespace dsa
