// dsatrain train RECIPE: all stages; resumes by itself from its run folder. Run it under mpirun.
#include <CLI/CLI.hpp>

#include <ATen/Parallel.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "parallel/device.h"
#include "parallel/mesh.h"
#include "recipes/validate.h"
#include "tools/commands.h"
#include "tools/launch.h"
#include "trainer/trainer.h"

namespace dsa {
namespace {

int threads_of_rank(int wanted) {
  if (wanted > 0) return wanted;
  if (const char* omp = std::getenv("OMP_NUM_THREADS")) return std::max(std::atoi(omp), 1);
  cpu_set_t visible;
  CPU_ZERO(&visible);
  sched_getaffinity(0, sizeof visible, &visible);
  return std::max(CPU_COUNT(&visible) / std::max(launched_local_size(), 1), 1);
}

at::Device device_of_rank(DeviceKind wanted) {
  if (wanted == DeviceKind::AUTO) wanted = visible_gpus() > 0 ? DeviceKind::GPU : DeviceKind::CPU;
  return wanted == DeviceKind::CPU ? at::Device(at::kCPU) : open_gpu(launched_local_rank(), launched_local_size());
}

int run_train(const std::string& path, const std::vector<std::string>& sets, int* argc, char*** argv) {
  // The recipe is checked before MPI starts, so that a mistake is said once and costs nothing.
  std::unique_ptr<ResolvedRecipe> recipe;
  const int refused = report_errors([&] {
    recipe = std::make_unique<ResolvedRecipe>(load_recipe(path, sets));
    check_world(*recipe, launched_size());
    return 0;
  });
  if (refused) return refused;
  const Recipe& r = recipe->recipe;
  at::set_num_threads(threads_of_rank(r.compute.threads));
  // A process that was started alone needs no MPI, nor what MPI needs of the machine.
  std::unique_ptr<MpiSession> mpi;
  if (launched_size() > 1) mpi = std::make_unique<MpiSession>(argc, argv);
  const auto work = [&] {
    Degrees degrees;
    degrees.tensor = static_cast<int>(r.parallel.tensor);
    degrees.context = static_cast<int>(r.parallel.context);
    degrees.expert = static_cast<int>(r.parallel.expert);
    degrees.data = (mpi ? mpi->size() : 1) / (degrees.tensor * degrees.context);
    Mesh mesh(degrees, /*check_calls=*/false, device_of_rank(r.compute.device), std::chrono::seconds(r.parallel.deadline));
    Trainer(*recipe, mesh).run();
    return 0;
  };
  return mpi ? report_errors_under_mpi(mpi->rank(), work) : report_errors(work);
}

}  // namespace

void add_train_command(CLI::App& app, std::function<int()>& run, int* argc, char*** argv) {
  CLI::App* c = app.add_subcommand("train", "Train: PRETRAIN, WARMUP or SPARSE, as the recipe says; resumes by itself");
  auto path = std::make_shared<std::string>();
  auto sets = std::make_shared<std::vector<std::string>>();
  c->add_option("recipe", *path, "recipe file (.textproto)")->required();
  c->add_option("--set", *sets, "path=value, wins over the files; may be repeated")->allow_extra_args(false);
  c->footer(
      "Example, on two CPU ranks:\n"
      "  mpirun -np 2 dsatrain train recipes/tiny_warmup.textproto --set schedule.steps=20\n"
      "The number of ranks must be a multiple of parallel.tensor x parallel.context; the rest is data parallel.\n"
      "Run the same command again to resume from the newest checkpoint of run.folder. SIGUSR1 to mpirun saves and stops, as\n"
      "does SIGTERM to the ranks (mpirun itself gives them a second after SIGTERM; set --mca odls_base_sigkill_timeout).\n"
      "Every field: recipes/recipe.proto; what a recipe amounts to: dsatrain recipe RECIPE.\n"
      "Exit status: 0 done, 2 recipe, 3 input or checkpoint refused, 4 out of device memory, 65 gradients not finite,\n"
      "70 internal error, 71 a rank died or hangs, 74 cannot save, 75 stopped on request and saved.");
  c->callback([=, &run] { run = [=] { return run_train(*path, *sets, argc, argv); }; });
}

}  // namespace dsa
