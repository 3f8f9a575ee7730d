// dsatrain export: weights of any form -> a HuggingFace folder in the release's form.
#include <CLI/CLI.hpp>

#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

#include "tools/commands.h"
#include "trainer/checkpoint/export.h"
#include "trainer/metrics/progress.h"

namespace dsa {
namespace {

struct Arguments {
  std::string from, to, format, dtype = "fp8";
};

// An export that was killed leaves its unfinished folder beside the target; it may also be another that still runs.
void mention_leftovers(const std::string& to) {
  std::filesystem::path target = std::filesystem::absolute(to).lexically_normal();
  if (!target.has_filename()) target = target.parent_path();  // "folder/"
  std::error_code unreadable;
  for (const auto& entry : std::filesystem::directory_iterator(target.parent_path(), unreadable))
    if (entry.path().filename().string().starts_with(target.filename().string() + ".tmp-"))
      std::printf("note: %s is left of an export that did not finish: remove it if none is running\n", entry.path().c_str());
}

int run_export(const Arguments& a) {
  return report_errors([&] {
    const auto source = open_weights(a.from);
    ExportOptions options;
    if (!a.format.empty()) options.format = a.format == "v3.1" ? HfFormat::V31 : HfFormat::V32;
    options.dtype = a.dtype == "fp8" ? HfDtype::FP8 : a.dtype == "bf16" ? HfDtype::BF16 : HfDtype::FP32;
    std::printf("export %s -> %s\n", source->describe().c_str(), a.to.c_str());
    mention_leftovers(a.to);
    std::unique_ptr<Progress> progress;
    uint64_t before = 0;
    export_checkpoint(*source, a.to, options, [&](uint64_t done, uint64_t total, const std::string&) {
      if (!progress) progress = std::make_unique<Progress>("export", static_cast<int64_t>(total), "bytes");
      progress->add(static_cast<int64_t>(done - before));
      before = done;
    });
    progress.reset();
    std::printf("wrote %s\n", a.to.c_str());
    return 0;
  });
}

}  // namespace

void add_export_command(CLI::App& app, std::function<int()>& run) {
  CLI::App* c = app.add_subcommand("export", "Write a checkpoint as a HuggingFace folder (V3.1 or V3.2, FP8 or wider)");
  auto a = std::make_shared<Arguments>();
  c->add_option("--from", a->from, "run folder, native checkpoint or HF folder")->required();
  c->add_option("--to", a->to, "folder to write; must not exist")->required();
  c->add_option("--format", a->format, "default: v3.2 when there is an indexer, else v3.1")
      ->check(CLI::IsMember({"v3.1", "v3.2"}));
  c->add_option("--dtype", a->dtype, "how matrices are stored (default fp8)")->check(CLI::IsMember({"fp8", "bf16", "fp32"}));
  c->footer(
      "Examples:\n"
      "  dsatrain export --from runs/tiny/pretrain --to runs/tiny/v31              a V3.1 folder, FP8\n"
      "  dsatrain export --from runs/tiny/sparse --to runs/tiny/v32 --dtype bf16   a V3.2 folder\n"
      "Of a run folder its newest sound checkpoint is taken. Weights that were never trained keep their bytes.");
  c->callback([a, &run] { run = [a] { return run_export(*a); }; });
}

}  // namespace dsa
