// A collective that cannot finish although this rank called it rightly: a rank died or hangs, or the transport broke.
// The group is unusable afterwards; the process leaves with kExitCommunication.
#pragma once

#include <chrono>
#include <stdexcept>

namespace dsa {

class CommunicationFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline constexpr int kExitCommunication = 71;

/// How long a collective may wait for the other ranks. Longer than any rank computes, loads or saves by itself
/// between two collectives.
inline constexpr std::chrono::milliseconds kDefaultDeadline = std::chrono::minutes(30);

}  // namespace dsa
