// The communicator of a group of one: every collective is a copy. Needs no MPI, works on any device.
#pragma once

#include "parallel/communicator.h"

namespace dsa {

class LocalCommunicator final : public Communicator {
 public:
  explicit LocalCommunicator(std::string name = "local");

 protected:
  at::Tensor do_all_gather_v(const at::Tensor& x, const std::vector<int64_t>& counts) override;
  at::Tensor do_reduce_scatter(const at::Tensor& x) override;
  at::Tensor do_all_reduce(const at::Tensor& x, Reduction reduction) override;
  Transfer do_all_to_all(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                         const std::vector<int64_t>& recv_counts) override;
  void do_broadcast(at::Tensor& x, int root) override;
  void do_barrier() override;
};

}  // namespace dsa
