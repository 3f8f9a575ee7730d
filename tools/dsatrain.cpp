// dsatrain: the one program. Parses the command line, runs a subcommand, and is the only place that catches and exits:
//   0 done   2 recipe or command line   3 input or checkpoint refused   65 non-finite   70 internal   74 cannot save
#include <CLI/CLI.hpp>

#include <cstdio>
#include <cstdlib>
#include <exception>

#include "tools/commands.h"

namespace {

int world_rank() {
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  return rank ? std::atoi(rank) : 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"dsatrain: from a DeepSeek-V3.1 checkpoint to a V3.2 one: trains DeepSeek Sparse Attention"};
  app.require_subcommand(1);
  app.set_help_all_flag("--help-all", "help of every subcommand");
  std::function<int()> run;
  dsa::add_train_command(app, run, &argc, &argv);
  dsa::add_export_command(app, run);
  dsa::add_probe_command(app, run, &argc, &argv);
  dsa::add_inspect_command(app, run);
  dsa::add_recipe_command(app, run);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (world_rank() != 0) return e.get_exit_code() == 0 ? 0 : 2;
    return app.exit(e) == 0 ? 0 : 2;
  }
  return run();
}
