// dsatrain: the one program. Parses the command line, runs a subcommand, and is the only place that catches and exits:
//   0 done   2 recipe or command line   3 input or checkpoint refused   4 out of device memory   65 non-finite
//   70 internal   71 a rank died or hangs   74 cannot save   75 stopped on request, state saved
#include <CLI/CLI.hpp>

#include <cstdio>
#include <stdexcept>
#include <string>

#include "tools/commands.h"
#include "tools/launch.h"

namespace {

// CLI11 calls a subcommand that it does not know a missing one.
std::string explain(const CLI::App& app, const CLI::ParseError& e, int argc, char** argv) {
  std::string names;
  for (const CLI::App* c : app.get_subcommands({})) {
    if (argc < 2 || argv[1][0] == '-' || c->get_name() == argv[1]) return e.what();
    names += (names.empty() ? "" : ", ") + c->get_name();
  }
  return std::string("there is no subcommand ") + argv[1] + ", only " + names;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"dsatrain: from a DeepSeek-V3.1 checkpoint to a V3.2 one: trains DeepSeek Sparse Attention"};
  app.footer("From V3.1 to V3.2: train (WARMUP), train (SPARSE), export. Each subcommand explains itself: dsatrain train --help");
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
    if (e.get_exit_code() != 0)
      return dsa::report_errors([&]() -> int {
        throw std::invalid_argument(std::string("cannot understand the command line (") + explain(app, e, argc, argv) + ") see dsatrain --help");
      });
    return dsa::launched_rank() == 0 ? app.exit(e) : 0;
  }
  return run();
}
