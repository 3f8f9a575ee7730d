// The names inside a run folder: RUN/checkpoints/step-00001200, and what a dead or running save leaves beside them
// (step-....tmp-RUNID, step-....trash).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dsa {

constexpr const char* kCheckpointsFolder = "checkpoints";

/// RUN/checkpoints/step-00001200. It need not exist.
std::string checkpoint_folder(const std::string& run_folder, int64_t step);

/// The steps of a run that have a checkpoint folder (sound or not), ascending; none when there is no such folder.
std::vector<int64_t> checkpoint_steps(const std::string& run_folder);

/// Whether a name in RUN/checkpoints is that of something unfinished or discarded.
bool is_leftover(const std::string& name);

/// Removes unfinished and discarded checkpoints, as far as it can. Only the run that owns the folder may call it.
void remove_leftovers(const std::string& checkpoints_folder);

}  // namespace dsa
