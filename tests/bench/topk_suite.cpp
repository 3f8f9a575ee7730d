// Exact top-2048 of 4096 rows: TB/s of logits read once (4 bytes a score). Floors: 3.02 TB/s (copy), measured on an
// H100 80GB. Besides random scores: ties and narrow bands, which may cost at most 1.5 times as much. And an MoE router's
// choice, the 8 best of 256 scores of 131,072 tokens.
#include <cmath>
#include <cstdio>
#include <string>

#include "kernels/topk_select/params.h"
#include "tests/bench/bench.h"
#include "tests/bench/patterns.h"
#include "tests/support/cuda_device.h"

namespace dsa::bench {

void run_topk_suite(const Options& options, Report& report) {
  using test::DeviceArray;
  struct Case {
    int64_t columns;
    double peer, goal;
  };
  const int64_t rows = 4096;
  for (const Case& c : {Case{8192, 0.58, 1.2}, Case{32768, 1.00, 1.8}, Case{131072, 1.20, 2.2}}) {
    const DeviceArray<float> logits(rows * c.columns);
    const DeviceArray<int32_t> indices(rows * 2048), lengths(rows), nans(rows);
    const DeviceArray<float> scores(rows * 2048);
    TopKSelectParams p;
    p.rows = rows, p.columns = c.columns, p.k = 2048;
    p.logits = logits.data(), p.logits_stride = c.columns;
    p.indices = indices.data(), p.indices_stride = 2048;
    p.lengths = lengths.data(), p.nan_counts = nans.data();
    double random_ms = 0;
    for (const Pattern& pattern : patterns()) {
      char name[96];
      std::snprintf(name, sizeof name, "topk_select 2048 of 4096 x %ld, %s", static_cast<long>(c.columns), pattern.name);
      if (std::string(name).find(options.only) == std::string::npos) continue;
      fill(pattern, logits.data(), rows, c.columns, 41 + c.columns);
      const double ms = cold_milliseconds([&] { launch_topk_select_sm90(p); }, options.quick ? 7 : 15);
      if (random_ms == 0) random_ms = ms;
      const double bytes = 4.0 * rows * c.columns;
      const bool random = &pattern == &patterns()[0];
      const double goal = random ? c.goal : bytes / (1.5 * random_ms) * 1e-9;
      report.add({name, ms, bytes / ms * 1e-9, "TB/s", bytes / 3.02 * 1e-9, random ? c.peer : 0, goal});
      if (!random) continue;
      TopKSelectParams with_scores = p;
      with_scores.scores = scores.data(), with_scores.scores_stride = 2048;
      const double more_ms = cold_milliseconds([&] { launch_topk_select_sm90(with_scores); }, options.quick ? 7 : 15);
      report.add({std::string(name) + ", and their scores", more_ms, bytes / more_ms * 1e-9, "TB/s", bytes / 3.02 * 1e-9, 0, 0});
    }
  }
  const int64_t tokens = 131072, experts = 256;
  const std::string router = "topk_select 8 of 131072 x 256, random";
  if (router.find(options.only) == std::string::npos) return;
  const DeviceArray<float> logits(tokens * experts);
  const DeviceArray<int32_t> indices(tokens * 8), lengths(tokens), nans(tokens);
  fill(patterns()[0], logits.data(), tokens, experts, 43);
  TopKSelectParams p;
  p.rows = tokens, p.columns = experts, p.k = 8;
  p.logits = logits.data(), p.logits_stride = experts;
  p.indices = indices.data(), p.indices_stride = 8;
  p.lengths = lengths.data(), p.nan_counts = nans.data();
  const double ms = cold_milliseconds([&] { launch_topk_select_sm90(p); }, 15), bytes = 4.0 * tokens * experts;
  report.add({router, ms, bytes / ms * 1e-9, "TB/s", bytes / 3.02 * 1e-9, 0, 0});
}

}  // namespace dsa::bench
