// dsatrain recipe RECIPE: the resolved recipe, each value with where it was said.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "recipes/load.h"
#include "tools/commands.h"

namespace dsa {

void add_recipe_command(CLI::App& app, std::function<int()>& run) {
  CLI::App* c = app.add_subcommand("recipe", "Print the resolved recipe, each value with its origin");
  auto path = std::make_shared<std::string>();
  auto sets = std::make_shared<std::vector<std::string>>();
  c->add_option("recipe", *path, "recipe file (.textproto)")->required();
  c->add_option("--set", *sets, "path=value, wins over the files; may be repeated")->allow_extra_args(false);
  c->footer(
      "Example:\n"
      "  dsatrain recipe recipes/sparse_671b.textproto --set parallel.context=8\n"
      "Prints every field as path  value  # default, or the file and line, or --set. Exit status 2: a mistake, explained.");
  c->callback([path, sets, &run] {
    run = [path, sets] {
      return report_errors([&] {
        const ResolvedRecipe recipe = load_recipe(*path, *sets);
        size_t name = 0, value = 0;
        for (const Origin& o : recipe.values) {
          name = std::max(name, o.path.size());
          value = std::max(value, o.value.size());
        }
        for (const Origin& o : recipe.values)
          std::printf("%-*s  %-*s  # %s\n", static_cast<int>(name), o.path.c_str(), static_cast<int>(value),
                      o.value.c_str(), o.origin.c_str());
        std::printf("# digest %s\n", recipe.digest.c_str());
        return 0;
      });
    };
  });
}

}  // namespace dsa
