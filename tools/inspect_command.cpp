// dsatrain inspect PATH: what a path holds and whether it is sound. Exit code 3 when a problem was found.
#include <CLI/CLI.hpp>

#include <cstdio>
#include <memory>
#include <string>

#include "tools/commands.h"
#include "trainer/checkpoint/inspect.h"

namespace dsa {

void add_inspect_command(CLI::App& app, std::function<int()>& run) {
  CLI::App* c = app.add_subcommand("inspect", "Say what a checkpoint, run folder or token file is, and whether it is sound");
  auto path = std::make_shared<std::string>();
  c->add_option("path", *path, "HF folder, native checkpoint, run folder or token file")->required();
  c->footer(
      "Examples:\n"
      "  dsatrain inspect runs/tiny/warmup           its checkpoints, and the one that a resume would take\n"
      "  dsatrain inspect DeepSeek-V3.1              counts, dtypes; every name and shape against config.json\n"
      "  dsatrain inspect runs/tiny/tokens.h5        tokens, documents, vocabulary; reads every id\n"
      "Exit status: 0 sound, 3 a problem was found.");
  c->callback([path, &run] {
    run = [path] {
      return report_errors([&] {
        const Inspection found = inspect(*path);
        std::fputs(found.text.c_str(), stdout);
        return found.healthy ? 0 : 3;
      });
    };
  });
}

}  // namespace dsa
