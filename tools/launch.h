// What the launcher told this process, known before MPI starts: mpirun by OMPI_COMM_WORLD_*, srun by PMI*_RANK and
// SLURM_STEP_NUM_TASKS. One process on its own is rank 0 of 1.
#pragma once

#include <cstdlib>

namespace dsa {

// The first of the variables that is set, else `otherwise`.
template <typename... Names>
int launch_variable(int otherwise, Names... names) {
  for (const char* name : {names...})
    if (const char* value = std::getenv(name)) return std::atoi(value);
  return otherwise;
}

inline int launched_rank() { return launch_variable(0, "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"); }

// Inside a batch script Slurm's variables are set without srun too: only PMI says that ranks were started.
inline int launched_size() {
  const bool by_srun = std::getenv("PMIX_RANK") || std::getenv("PMI_RANK");
  return launch_variable(by_srun ? launch_variable(1, "SLURM_STEP_NUM_TASKS") : 1, "OMPI_COMM_WORLD_SIZE");
}

// Its number among the ranks of this machine, and how many they are.
inline int launched_local_rank() { return launch_variable(0, "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"); }
inline int launched_local_size() {
  return launch_variable(launched_local_rank() + 1, "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE");
}

}  // namespace dsa
