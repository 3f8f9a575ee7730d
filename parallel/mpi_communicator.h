// Collectives over MPI, for tensors in host memory.
//
// Everything but broadcast and barrier is one primitive, an exchange of byte blocks between all pairs of ranks
// (non-blocking point to point, messages of at most 1 GiB, so tensors may have any size), followed by arithmetic in
// rank order on this rank. MPI_Reduce is not used: its order of additions depends on the algorithm MPI picks.
//
// What is noticed when ranks disagree: a block with another number of bytes than expected, always. With
// `check_calls`, every call first exchanges what each rank is about to do (call, dtype, sizes, reduction, root) and
// all ranks throw, naming both sides, before any data moves; it costs one small all-gather a call. A rank that does
// not come within `deadline` ends the wait with CommunicationFailure; the group is lost then.
#pragma once

#include <mpi.h>

#include <chrono>

#include "parallel/communication_failure.h"
#include "parallel/communicator.h"

namespace dsa {

inline constexpr int64_t kLongestMessage = int64_t{1} << 30;

class MpiCommunicator final : public Communicator {
 public:
  /// Takes ownership of `comm` (freed in the destructor). MPI has to be initialised. `max_message`: bytes of the
  /// longest single message; smaller values serve tests.
  MpiCommunicator(MPI_Comm comm, std::string name, bool check_calls = false, int64_t max_message = kLongestMessage,
                  std::chrono::milliseconds deadline = kDefaultDeadline);
  ~MpiCommunicator() override;

  /// Throws on all ranks when the ranks' texts differ or, for all_to_all, when some block has another size at its
  /// receiver than at its sender. Does nothing without check_calls.
  void agree_on(const std::string& call, const std::vector<int64_t>& send_counts = {},
                const std::vector<int64_t>& recv_counts = {});

 protected:
  at::Tensor do_all_gather_v(const at::Tensor& x, const std::vector<int64_t>& counts) override;
  at::Tensor do_reduce_scatter(const at::Tensor& x) override;
  at::Tensor do_all_reduce(const at::Tensor& x, Reduction reduction) override;
  Transfer do_all_to_all(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                         const std::vector<int64_t>& recv_counts) override;
  void do_broadcast(at::Tensor& x, int root) override;
  void do_barrier() override;

 private:
  struct Block {
    char* data;
    int64_t bytes;
  };
  /// Sends send[r] to rank r and fills recv[r] from rank r, for all r at once.
  void exchange(const std::vector<Block>& send, const std::vector<Block>& recv);
  /// Brings a request to its end; returns MPI's result. Throws when the deadline passes first.
  int wait(MPI_Request& request, const char* what, MPI_Status* status = MPI_STATUS_IGNORE) const;
  void must(int mpi_result, const char* what) const;

  MPI_Comm comm_;
  bool check_calls_;
  int64_t max_message_;
  std::chrono::milliseconds deadline_;
};

}  // namespace dsa
