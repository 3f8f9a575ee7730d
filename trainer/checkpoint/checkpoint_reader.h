// Reading a native checkpoint in any layout: a box is put together from the stored boxes that it meets.
// What is read is checked first: file sizes and coverage at opening, the XXH3-128 of each 64 MiB block at its first
// use. The bytes come by pread at the positions that the manifest states, so no damaged byte ever reaches libhdf5.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "trainer/checkpoint/state_shard.h"

namespace dsa {

class Communicator;

class CheckpointReader {
 public:
  /// `path`: a checkpoint folder, or a run folder, whose newest valid checkpoint (newest_valid) is taken.
  /// Throws InputError: not there (lists the steps that are), damaged, of an unknown version, not covering its tensors.
  explicit CheckpointReader(const std::string& path);
  ~CheckpointReader();
  CheckpointReader(CheckpointReader&&) noexcept;

  const TrainingState& state() const;
  const std::string& path() const;  ///< the checkpoint folder
  std::string digest() const;       ///< the manifest's XXH3-128: names every byte of the checkpoint
  uint64_t bytes() const;           ///< of all shard files

  std::vector<std::string> names(Role role) const;  ///< sorted
  bool has(const std::string& name, Role role) const;
  std::vector<int64_t> shape(const std::string& name, Role role) const;
  Dtype stored_dtype(const std::string& name, Role role) const;

  /// Fills `out` (contiguous, box.extent) as F32 or F64 (rounded once when narrower than stored), or as BF16 when it
  /// is stored so. Throws InputError: no such tensor, another global shape, a damaged block.
  void read(const ShardSpec& box, Role role, Dtype dtype, void* out) const;

  /// Hashes block `part`, `part` + `parts`, ... of all files. Throws InputError at the first damaged one.
  void verify(int part = 0, int parts = 1) const;

  /// The newest checkpoint of a run whose every byte is as written; nothing when there is none. The reasons of those
  /// skipped are appended to `why_skipped` (may be null), newest first.
  static std::optional<std::string> newest_valid(const std::string& run_folder, std::vector<std::string>* why_skipped);
  /// The same, collective: the ranks share the hashing and agree on the answer.
  static std::optional<std::string> newest_valid(const std::string& run_folder, Communicator& world,
                                                 std::vector<std::string>* why_skipped);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsa
