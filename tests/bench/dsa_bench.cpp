// dsa_bench SUITE [--json FILE] [--only TEXT] [--quick]      kernels
// dsa_bench layer [options of layer_bench.cpp]               one decoder layer of the 671B model
// dsa_bench step RECIPE [options of train_step_bench.cpp]    where a training step goes
#include <cstdio>
#include <cstring>
#include <exception>

#include "tests/bench/bench.h"
#include "tests/bench/layer_bench.h"
#include "tests/support/cuda_device.h"

namespace {

struct Suite {
  const char* name;
  void (*run)(const dsa::bench::Options&, dsa::bench::Report&);
};
const Suite kSuites[] = {{"dense_mla", dsa::bench::run_dense_mla_suite},
                         {"indexer", dsa::bench::run_indexer_suite},
                         {"indexer_backward", dsa::bench::run_indexer_backward_suite},
                         {"indexer_kl", dsa::bench::run_indexer_kl_suite},
                         {"sparse_chain", dsa::bench::run_sparse_chain_suite},
                         {"topk", dsa::bench::run_topk_suite},
                         {"sparse_mla", dsa::bench::run_sparse_mla_suite}};

}  // namespace

int main(int argc, char** argv) try {
  if (argc > 1 && !std::strcmp(argv[1], "layer")) return dsa::bench::run_layer(argc - 2, argv + 2);
  if (argc > 1 && !std::strcmp(argv[1], "step")) return dsa::bench::run_train_step(argc - 2, argv + 2);
  dsa::bench::Options options;
  std::string json, suite = argc > 1 ? argv[1] : "";
  for (int i = 2; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--quick")) options.quick = true;
    else if (!std::strcmp(argv[i], "--json") && i + 1 < argc) json = argv[++i];
    else if (!std::strcmp(argv[i], "--only") && i + 1 < argc) options.only = argv[++i];
    else suite = "";
  }
  const Suite* chosen = nullptr;
  for (const Suite& s : kSuites)
    if (suite == s.name) chosen = &s;
  if (!chosen) {
    std::fprintf(stderr, "usage: dsa_bench SUITE [--json FILE] [--only TEXT] [--quick]   SUITE:");
    for (const Suite& s : kSuites) std::fprintf(stderr, " %s", s.name);
    std::fprintf(stderr, "\n       dsa_bench layer [--json FILE] [--lengths T,...] [--modes dense,warmup,sparse] [--repeats N]"
                         " [--kernels N] [--split context|tensor] [--ffn dense|experts]");
    std::fprintf(stderr, "\n       dsa_bench step RECIPE [--set path=value]... [--steps N] [--kernels N]");
    std::fprintf(stderr, "\n");
    return 2;
  }
  if (!dsa::test::have_device()) {
    std::puts("no CUDA device");
    return 0;
  }
  dsa::bench::Report report;
  chosen->run(options, report);
  if (!json.empty()) report.write_json(json);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "dsa_bench: %s\n", e.what());
  return 1;
}
