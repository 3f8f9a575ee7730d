// Collectives over NCCL, for tensors of this rank's GPU; host tensors of the same group travel over MPI.
//
// Everything is built of grouped ncclSend and ncclRecv (ncclAllGather where all pieces are equal) and of arithmetic in
// rank order on this GPU. ncclReduce is not used: its order of additions depends on the algorithm that NCCL picks.
//
// Data moves on a stream of the communicator's own. It waits for the current stream's work before the call, and the
// current stream waits for it (with a Transfer, when it is asked to): a caller sees results in stream order and the
// host never waits for the GPU. All ranks start the collectives of all their groups in one order, as kernels of several
// groups may be under way at once. The NCCL communicator is opened, without blocking, by the first call with a GPU tensor: a
// group that only moves host tensors takes no GPU memory.
//
// Failures: what NCCL reports, and a rank that does not come within `deadline`, is CommunicationFailure when the call
// itself notices it. Later the host may be waiting for the GPU, which waits for the lost rank: a watching thread then
// says so on stderr and ends the process with kExitCommunication.
#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "parallel/mpi_communicator.h"

struct ncclComm;

namespace dsa {

class NcclCommunicator final : public Communicator {
 public:
  /// `host`: the same group over MPI. `device`: this rank's GPU, opened (parallel/device.h).
  NcclCommunicator(std::unique_ptr<MpiCommunicator> host, at::Device device,
                   std::chrono::milliseconds deadline = kDefaultDeadline);
  ~NcclCommunicator() override;

 protected:
  at::Tensor do_all_gather_v(const at::Tensor& x, const std::vector<int64_t>& counts) override;
  at::Tensor do_reduce_scatter(const at::Tensor& x) override;
  at::Tensor do_all_reduce(const at::Tensor& x, Reduction reduction) override;
  Transfer do_all_to_all(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                         const std::vector<int64_t>& recv_counts) override;
  void do_broadcast(at::Tensor& x, int root) override;
  void do_barrier() override;  // of the hosts; what the GPUs still compute is not waited for

 private:
  using Clock = std::chrono::steady_clock;
  using Done = std::shared_ptr<c10::Event>;
  struct Running {
    std::string call;
    Done done;
    Clock::time_point since;
  };

  void open();
  /// Enqueues what `issue` calls in one NCCL group, and beside it `meanwhile` on the current stream, which does not
  /// wait yet.
  Done enqueue(const std::string& call, const std::function<void()>& issue, const std::function<void()>& meanwhile);
  void wait(const Done& done) const;
  /// Sends send[r] to every other rank r and fills recv[r] from it; this rank's own piece is copied where
  /// recv[rank()] is defined. All contiguous.
  Done exchange(const std::string& call, const std::vector<at::Tensor>& send, const std::vector<at::Tensor>& recv);
  void must(int result, const std::string& what) const;
  /// Waits until NCCL has done what it was asked without blocking. Locked.
  void settle(int result, const std::string& what) const;
  std::string stands_still(const std::string& what) const;
  void watch();
  [[noreturn]] void leave(const std::string& problem) const;

  std::unique_ptr<MpiCommunicator> host_;
  at::Device device_;
  std::chrono::milliseconds deadline_;
  ncclComm* comm_ = nullptr;
  c10::Stream stream_;

  std::mutex mutex_;  // comm_ and what follows, between the calling and the watching thread
  std::condition_variable wake_;
  std::deque<Running> running_;  // enqueued, not yet seen done
  bool stopping_ = false;
  std::thread watcher_;
};

}  // namespace dsa
