// One group of ranks and its collectives.
//
// The contract, the same for every implementation:
//  * All ranks of the group make the same calls in the same order, with the same dtype.
//  * Tensors are split and joined along dimension 0; they have at least one dimension. A non-contiguous argument is
//    made contiguous first. Empty tensors are legal everywhere.
//  * Results are fresh tensors, contiguous, never aliases of an argument (also in a group of one).
//  * Sums add the pieces of rank 0, 1, 2, ... in this order; bf16 and fp16 are added in fp32 and rounded once,
//    integers wrap in their own dtype. So a result never depends on timing and is the same on all ranks bit by bit.
//  * Host tensors are legal in every group, whatever it computes on.
//  * No autograd here: an argument that requires grad while grad mode is on is refused, because its gradient would
//    be lost silently. Use parallel/collectives.h, detach(), or at::NoGradGuard.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace c10 {
struct Event;
}

namespace dsa {

/// A collective under way beside the current stream. It keeps its argument and its result alive; neither may be written
/// or read before wait(). One that is dropped waits, too.
class Transfer {
 public:
  Transfer() = default;
  /// done: follows the last access to both; null: nothing is under way any more.
  Transfer(at::Tensor argument, at::Tensor result, std::shared_ptr<c10::Event> done);
  Transfer(Transfer&& other) noexcept;
  Transfer& operator=(Transfer&& other) noexcept;
  ~Transfer();

  /// Where the result is coming: shape, dtype and device are those of the result.
  const at::Tensor& result() const { return result_; }
  /// The result, for the current stream's work from here on.
  at::Tensor wait();

 private:
  at::Tensor argument_, result_;
  std::shared_ptr<c10::Event> done_;
};

enum class Reduction { SUM, MAX, MIN };  // MAX and MIN carry NaN along

class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }                 ///< in this group
  int size() const { return size_; }
  const std::string& name() const { return name_; }  ///< for messages, e.g. "tensor"

  // Each throws std::invalid_argument when the arguments contradict themselves on this rank, and
  // std::runtime_error when ranks disagree (as far as the implementation notices); CommunicationFailure when the
  // transport fails or a rank does not come.

  /// x [n, ...] (n equal on all ranks) -> [size*n, ...], rank 0's rows first.
  at::Tensor all_gather(const at::Tensor& x);
  /// x [counts[rank], ...] -> [sum(counts), ...]; `counts` is the same on all ranks.
  at::Tensor all_gather_v(const at::Tensor& x, const std::vector<int64_t>& counts);
  /// x [n_rank, ...] with n_rank unknown to the others -> one tensor per rank (counts are exchanged first).
  std::vector<at::Tensor> all_gather_ragged(const at::Tensor& x);
  /// x [size*n, ...] -> [n, ...]: the sum over ranks of block `rank`.
  at::Tensor reduce_scatter(const at::Tensor& x);
  /// x of any shape, equal on all ranks -> the same shape.
  at::Tensor all_reduce(const at::Tensor& x, Reduction reduction = Reduction::SUM);
  /// x [sum(send_counts), ...] -> [sum(recv_counts), ...]: rows go to rank 0, 1, ... in blocks of send_counts
  /// rows; the blocks received from rank 0, 1, ... stand in this order.
  at::Tensor all_to_all(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                        const std::vector<int64_t>& recv_counts);
  /// The same, to be waited for later, so that the GPU can compute meanwhile; host tensors have arrived on return.
  Transfer start_all_to_all(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                            const std::vector<int64_t>& recv_counts);
  /// Writes root's x into everybody's x (contiguous, same shape and dtype).
  void broadcast(at::Tensor& x, int root);
  void barrier();
  /// Every rank's text (any bytes), by rank.
  std::vector<std::string> all_gather_text(const std::string& text);

 protected:
  /// `device`: where tensors may lie besides the host; nothing = anywhere.
  Communicator(std::string name, int rank, int size, std::optional<c10::Device> device);

  // Arguments are contiguous, consistent, detached, on the right device; grad mode is off.
  virtual at::Tensor do_all_gather_v(const at::Tensor& x, const std::vector<int64_t>& counts) = 0;
  virtual at::Tensor do_reduce_scatter(const at::Tensor& x) = 0;
  virtual at::Tensor do_all_reduce(const at::Tensor& x, Reduction reduction) = 0;
  virtual Transfer do_all_to_all(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                                 const std::vector<int64_t>& recv_counts) = 0;
  virtual void do_broadcast(at::Tensor& x, int root) = 0;
  virtual void do_barrier() = 0;

 private:
  at::Tensor checked(const at::Tensor& x, const char* call) const;

  std::string name_;
  int rank_;
  int size_;
  std::optional<c10::Device> device_;
};

}  // namespace dsa
