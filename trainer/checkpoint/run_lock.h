// One run, one writer: RUN/LOCK holds the host, the process id and its start time (which tells a reused id apart).
#pragma once

#include <string>

namespace dsa {

/// Takes the lock of a run folder (created when missing) for the life of the object; held by rank 0 of a run.
/// A lock left by a process of this host that is gone is taken over. Throws InputError: another live run holds it
/// (named), a run on another host does (it cannot be seen from here whether it lives), the folder is not writable.
class RunLock {
 public:
  explicit RunLock(const std::string& run_folder);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  std::string file_, owner_;
};

}  // namespace dsa
