// recipe.proto's message <-> the plain Recipe: one table of paths and members serves both directions.
#pragma once

#include <string>

#include "recipes/recipe.h"

namespace dsa::proto {
class Recipe;
}

namespace dsa {

// Fields that the message lacks keep Recipe's defaults.
Recipe to_recipe(const proto::Recipe& message);

// Every field set, except the optional members that are empty.
void to_message(const Recipe& recipe, proto::Recipe& message);

// Everything in text format, in the order of recipe.proto.
std::string to_text(const Recipe& recipe);

}  // namespace dsa
