#pragma once

#include <string>
#include <vector>

#include "parallel/communicator.h"

namespace dsa::test {

/// Passes everything on and notes the rows of width H that this rank sends to others and to itself.
class Watched final : public Communicator {
 public:
  explicit Watched(Communicator& inner) : Communicator("watched", inner.rank(), inner.size(), {}), inner_(inner) {}
  std::vector<int64_t> wide_rows;  // one entry per all_to_all
  std::vector<std::string> log;    // "rows leave", and what a test adds

 protected:
  Transfer do_all_to_all(const at::Tensor& x, const std::vector<int64_t>& send,
                         const std::vector<int64_t>& recv) override {
    if (x.is_floating_point() && x.dim() == 2) {
      wide_rows.push_back(x.size(0));
      log.push_back("rows leave");
    }
    return inner_.start_all_to_all(x, send, recv);
  }
  at::Tensor do_all_gather_v(const at::Tensor& x, const std::vector<int64_t>& counts) override {
    return inner_.all_gather_v(x, counts);
  }
  at::Tensor do_reduce_scatter(const at::Tensor& x) override { return inner_.reduce_scatter(x); }
  at::Tensor do_all_reduce(const at::Tensor& x, Reduction r) override { return inner_.all_reduce(x, r); }
  void do_broadcast(at::Tensor& x, int root) override { inner_.broadcast(x, root); }
  void do_barrier() override { inner_.barrier(); }

 private:
  Communicator& inner_;
};

}  // namespace dsa::test
