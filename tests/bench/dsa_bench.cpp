// dsa_bench SUITE [--json FILE] [--only TEXT] [--quick]     SUITE: indexer, topk, sparse_mla
#include <cstdio>
#include <cstring>
#include <exception>

#include "tests/bench/bench.h"
#include "tests/support/cuda_device.h"

int main(int argc, char** argv) try {
  dsa::bench::Options options;
  std::string json, suite = argc > 1 ? argv[1] : "";
  for (int i = 2; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--quick")) options.quick = true;
    else if (!std::strcmp(argv[i], "--json") && i + 1 < argc) json = argv[++i];
    else if (!std::strcmp(argv[i], "--only") && i + 1 < argc) options.only = argv[++i];
    else suite = "";
  }
  if (suite != "indexer" && suite != "topk" && suite != "sparse_mla") {
    std::fprintf(stderr, "usage: dsa_bench indexer|topk|sparse_mla [--json FILE] [--only TEXT] [--quick]\n");
    return 2;
  }
  if (!dsa::test::have_device()) {
    std::puts("no CUDA device");
    return 0;
  }
  dsa::bench::Report report;
  (suite == "indexer" ? dsa::bench::run_indexer_suite
   : suite == "topk"  ? dsa::bench::run_topk_suite
                      : dsa::bench::run_sparse_mla_suite)(options, report);
  if (!json.empty()) report.write_json(json);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "dsa_bench: %s\n", e.what());
  return 1;
}
