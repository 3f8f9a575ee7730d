// Writing a native checkpoint, so that a checkpoint either is complete or is not there:
//
//   RUN/checkpoints/step-00001200.tmp-RUNID/   staging, on the same file system
//      shard-r0003.h5                          one a rank: serial HDF5, libver latest, contiguous, no filter
//      MANIFEST.json                           written last, by rank 0, when every rank has reported success
//   RUN/checkpoints/step-00001200/             after ONE rename
//   RUN/checkpoints/LATEST                     a hint for people; nothing reads it
//
// Every file is fsynced, then read back once: compared with memory and hashed (XXH3-128, the whole and each 64 MiB
// block). The hashes are in the manifest, and the manifest ends with its own.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "trainer/checkpoint/state_shard.h"

namespace dsa {

class Communicator;

struct SaveResult {
  bool committed = false;
  std::string path;     ///< of the checkpoint, when committed
  std::string error;    ///< why not, with the rank; when committed: what could not be tidied up afterwards, else empty
  uint64_t bytes = 0;   ///< of all shard files together
  double seconds = 0;
};

/// Writes RUN/checkpoints/step-<state.step>. Collective over `world`, whose ranks share the file system; every rank
/// gets the same result. The boxes of all ranks together must cover each tensor exactly once per role, copies on
/// several ranks counted once: a copy is written by the rank with the least to write, large ones in pieces by several.
/// A checkpoint of the same step is replaced. Afterwards the newest `keep` (at least 1) checkpoints up to this step
/// stay. `wrote` hears the bytes this rank has written. A failure (disk full, ...) does not throw: it leaves the earlier checkpoints as they were and no remains.
SaveResult save_checkpoint(const std::string& run_folder, const TrainingState& state,
                           const std::vector<StateShard>& shards, Communicator& world, int keep,
                           const std::function<void(uint64_t)>& wrote = {});

}  // namespace dsa
