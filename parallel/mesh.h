// This process's place among the ranks: its coordinates, and one communicator per axis. An axis on which this rank is
// alone gets the local communicator.
#pragma once

#include <array>
#include <chrono>
#include <memory>
#include <string>

#include "parallel/communication_failure.h"
#include "parallel/communicator.h"
#include "parallel/layout.h"

namespace dsa {

/// MPI for the lifetime of the object: MPI_Init_thread now, MPI_Finalize at the end. When the object dies because an
/// exception passes, the other ranks may be inside a collective for ever, so it ends all of them (exit code 70)
/// instead of finalising; to print first and choose the code, catch inside its scope and call abort().
class MpiSession {
 public:
  /// Throws std::runtime_error when MPI is initialised already or cannot serve calls from changing threads
  /// (autograd runs the backward of device tensors in threads of its own).
  MpiSession(int* argc, char*** argv);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  int rank() const;  ///< in the world
  int size() const;
  /// Ends every rank at once; mpirun returns `exit_code`.
  [[noreturn]] static void abort(int exit_code);

 private:
  int exceptions_at_start_;
};

class Mesh {
 public:
  /// Collective over all ranks of MPI_COMM_WORLD. MPI may be missing when the degrees describe one rank.
  /// `check_calls`: see MpiCommunicator. Throws std::invalid_argument for illegal degrees, and when their product
  /// is not the number of ranks that mpirun started. `device`: where this rank computes (parallel/device.h); GPUs are
  /// connected by NCCL. `deadline`: how long a collective waits for a rank before it gives the group up.
  explicit Mesh(Degrees degrees, bool check_calls = false, at::Device device = at::kCPU,
                std::chrono::milliseconds deadline = kDefaultDeadline);
  /// One process by itself, whether or not MPI runs.
  static Mesh single(at::Device device = at::kCPU);

  Mesh(Mesh&&) = default;
  Mesh& operator=(Mesh&&) = default;

  const ParallelLayout& layout() const { return layout_; }
  const Coordinates& coordinates() const { return coordinates_; }
  int rank() const { return rank_; }
  int world_size() const { return layout_.world(); }
  at::Device device() const { return device_; }

  /// The group of this rank along `axis`. The reference lives as long as the mesh, also when the mesh is moved.
  Communicator& along(Axis axis) const { return *groups_[static_cast<size_t>(axis)]; }

  /// "[rank 3 tp=1 cp=0 dp=0 ep=1]", the start of a message.
  std::string label() const;

 private:
  explicit Mesh(at::Device device);

  ParallelLayout layout_;
  int rank_;
  at::Device device_;
  Coordinates coordinates_;
  std::array<std::unique_ptr<Communicator>, kAxisCount> groups_;
};

}  // namespace dsa
