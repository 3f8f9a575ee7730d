// dsa_bench step RECIPE [--set path=value]... [--steps N] [--kernels N]
//
// Where a training step goes: N steps (default 8) of the recipe on one GPU by the clock; then the device time of the next one
// by kernel. Kernels that run side by side count twice, so the sum can be more than the step. No checkpoint is written.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "parallel/device.h"
#include "recipes/load.h"
#include "tests/bench/kernel_times.h"
#include "tests/bench/layer_bench.h"
#include "trainer/trainer.h"

namespace dsa::bench {

int run_train_step(int argc, char** argv) {
  std::vector<std::string> sets{"checkpoint.every=1000000", "run.eval_every=0", "run.folder=runs/dsa_bench_step"};
  int steps = 8;
  size_t kernels = 25;
  if (argc < 1) throw std::invalid_argument("no recipe (usage: dsa_bench step RECIPE [options]) name one");
  for (int i = 1; i < argc; i += 2) {
    if (i + 1 == argc) throw std::invalid_argument(std::string("no value (") + argv[i] + " is the last argument) give one");
    if (!std::strcmp(argv[i], "--set")) sets.push_back(argv[i + 1]);
    else if (!std::strcmp(argv[i], "--steps")) steps = std::atoi(argv[i + 1]);
    else if (!std::strcmp(argv[i], "--kernels")) kernels = std::stoul(argv[i + 1]);
    else throw std::invalid_argument(std::string("unknown option (") + argv[i] + ") take --set, --steps or --kernels");
  }
  if (visible_gpus() == 0) {
    std::puts("no CUDA device");
    return 0;
  }
  const ResolvedRecipe recipe = load_recipe(argv[0], sets);
  Mesh mesh = Mesh::single(open_gpu(0, 1));
  Trainer trainer(recipe, mesh);
  double last = 0;
  for (int n = 1; n <= steps; ++n) {
    const StepReport r = trainer.step(n);
    last = 1e3 * r.step_seconds;
    std::printf("step %d  %.1f ms  %.0f tokens/s\n", n, last, r.tokens_per_second);
  }
  const std::vector<KernelTime> times = kernel_times([&] { trainer.step(steps + 1); });
  double sum = 0;
  for (const KernelTime& t : times) sum += t.milliseconds;
  std::printf("kernels %.1f ms of a step of %.1f ms\n", sum, last);
  for (size_t k = 0; k < std::min(kernels, times.size()); ++k)
    std::printf("    %5.1f %%  %9.2f ms  %6ld x  %s\n", 100 * times[k].milliseconds / last, times[k].milliseconds,
                static_cast<long>(times[k].launches), times[k].name.c_str());
  return 0;
}

}  // namespace dsa::bench
