// The subcommands of dsatrain: each adds itself to the command line and, when chosen, puts its work into `run`.
#pragma once

#include <functional>

namespace CLI {
class App;
}

namespace dsa {

void add_train_command(CLI::App& app, std::function<int()>& run, int* argc, char*** argv);
void add_export_command(CLI::App& app, std::function<int()>& run);
void add_probe_command(CLI::App& app, std::function<int()>& run, int* argc, char*** argv);
void add_inspect_command(CLI::App& app, std::function<int()>& run);
void add_recipe_command(CLI::App& app, std::function<int()>& run);

// Runs `work`; an exception becomes one message on stderr (from rank 0, or from the only rank that failed) and an
// exit code. For work before MPI starts.
int report_errors(const std::function<int()>& work);

// The same for work between MPI_Init and MPI_Finalize, on `rank`: the other ranks may wait for this one, so a failure
// ends them all.
int report_errors_under_mpi(int rank, const std::function<int()>& work);

}  // namespace dsa
