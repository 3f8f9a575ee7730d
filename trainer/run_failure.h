// A run that cannot go on although recipe and input were fine. The exit code survives mpirun.
#pragma once

#include <stdexcept>
#include <string>

namespace dsa {

class RunFailure : public std::runtime_error {
 public:
  RunFailure(int exit_code, const std::string& message) : std::runtime_error(message), exit_code_(exit_code) {}
  int exit_code() const { return exit_code_; }

 private:
  int exit_code_;
};

inline constexpr int kExitOutOfMemory = 4;        // the device's memory does not suffice
inline constexpr int kExitNonFinite = 65;         // too many steps with a NaN or Inf in a row
inline constexpr int kExitCannotCheckpoint = 74;  // too many failed saves in a row
inline constexpr int kExitPreempted = 75;         // asked to stop; the state is saved: run again

}  // namespace dsa
