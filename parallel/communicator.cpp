#include "parallel/communicator.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace dsa {

namespace {

int64_t total(const std::vector<int64_t>& counts) { return std::accumulate(counts.begin(), counts.end(), int64_t{0}); }

[[noreturn]] void refuse(const std::string& group, const char* call, const std::string& why,
                         const std::string& suggestion) {
  throw std::invalid_argument(std::string(call) + " in the " + group + " group refused (" + why + ") " + suggestion);
}

void must_have_rows(const std::string& group, const char* call, const at::Tensor& x) {
  if (x.dim() < 1) refuse(group, call, "the tensor has no dimension 0 to split or join", "reshape a scalar to [1]");
}

void must_count(const std::string& group, const char* call, const std::vector<int64_t>& counts, int size) {
  if (static_cast<int>(counts.size()) != size)
    refuse(group, call, std::to_string(counts.size()) + " counts for " + std::to_string(size) + " ranks",
           "give one count per rank");
  for (int64_t count : counts)
    if (count < 0) refuse(group, call, "a count of " + std::to_string(count), "counts are 0 or more");
}

}  // namespace

Transfer::Transfer(at::Tensor argument, at::Tensor result, std::shared_ptr<c10::Event> done)
    : argument_(std::move(argument)), result_(std::move(result)), done_(std::move(done)) {}

Transfer::Transfer(Transfer&& other) noexcept { *this = std::move(other); }

Transfer& Transfer::operator=(Transfer&& other) noexcept {
  std::swap(argument_, other.argument_);
  std::swap(result_, other.result_);
  std::swap(done_, other.done_);
  return *this;
}

Transfer::~Transfer() {
  try {
    wait();  // the memory goes back to work that comes after it on the current stream
  } catch (const std::exception&) {  // the GPU itself failed: whoever uses it next hears of it
  }
}

at::Tensor Transfer::wait() {
  if (done_) done_->block(c10::impl::getDeviceGuardImpl(result_.device().type())->getStream(result_.device()));
  done_.reset();
  argument_.reset();
  return std::exchange(result_, {});
}

Communicator::Communicator(std::string name, int rank, int size, std::optional<c10::Device> device)
    : name_(std::move(name)), rank_(rank), size_(size), device_(device) {}

at::Tensor Communicator::checked(const at::Tensor& x, const char* call) const {
  if (!x.defined()) refuse(name_, call, "the tensor is undefined", "give an empty tensor where there is nothing to send");
  if (x.requires_grad() && at::GradMode::is_enabled())
    refuse(name_, call, "the tensor requires grad and its gradient would be lost",
           "use the differentiable collective, detach() or NoGradGuard");
  if (device_ && !x.is_cpu() && x.device() != *device_)
    refuse(name_, call, "the tensor lies on " + x.device().str(),
           "this group moves tensors of the " + (device_->is_cpu() ? "host only" : "host and of " + device_->str()));
  at::NoGradGuard no_grad;
  return x.detach().contiguous();
}

at::Tensor Communicator::all_gather(const at::Tensor& x) {
  const at::Tensor input = checked(x, "all_gather");
  at::NoGradGuard no_grad;
  must_have_rows(name_, "all_gather", input);
  return do_all_gather_v(input, std::vector<int64_t>(size_, input.size(0)));
}

at::Tensor Communicator::all_gather_v(const at::Tensor& x, const std::vector<int64_t>& counts) {
  const at::Tensor input = checked(x, "all_gather_v");
  at::NoGradGuard no_grad;
  must_have_rows(name_, "all_gather_v", input);
  must_count(name_, "all_gather_v", counts, size_);
  if (input.size(0) != counts[rank_])
    refuse(name_, "all_gather_v", std::to_string(input.size(0)) + " rows, but this rank's count is " +
           std::to_string(counts[rank_]), "they must agree");
  return do_all_gather_v(input, counts);
}

std::vector<at::Tensor> Communicator::all_gather_ragged(const at::Tensor& x) {
  const at::Tensor input = checked(x, "all_gather_ragged");
  at::NoGradGuard no_grad;
  must_have_rows(name_, "all_gather_ragged", input);
  at::Tensor mine = at::empty({1}, at::TensorOptions(at::kLong));
  mine.data_ptr<int64_t>()[0] = input.size(0);
  const at::Tensor gathered = do_all_gather_v(mine, std::vector<int64_t>(size_, 1));  // over the host
  const std::vector<int64_t> counts(gathered.data_ptr<int64_t>(), gathered.data_ptr<int64_t>() + size_);
  return do_all_gather_v(input, counts).split_with_sizes(counts);
}

at::Tensor Communicator::reduce_scatter(const at::Tensor& x) {
  const at::Tensor input = checked(x, "reduce_scatter");
  at::NoGradGuard no_grad;
  must_have_rows(name_, "reduce_scatter", input);
  if (input.size(0) % size_ != 0)
    refuse(name_, "reduce_scatter", std::to_string(input.size(0)) + " rows over " + std::to_string(size_) + " ranks",
           "the rows must be a multiple of the ranks");
  return do_reduce_scatter(input);
}

at::Tensor Communicator::all_reduce(const at::Tensor& x, Reduction reduction) {
  const at::Tensor input = checked(x, "all_reduce");
  at::NoGradGuard no_grad;
  return do_all_reduce(input, reduction);
}

at::Tensor Communicator::all_to_all(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                                    const std::vector<int64_t>& recv_counts) {
  return start_all_to_all(x, send_counts, recv_counts).wait();
}

Transfer Communicator::start_all_to_all(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                                        const std::vector<int64_t>& recv_counts) {
  const at::Tensor input = checked(x, "all_to_all");
  at::NoGradGuard no_grad;
  must_have_rows(name_, "all_to_all", input);
  must_count(name_, "all_to_all", send_counts, size_);
  must_count(name_, "all_to_all", recv_counts, size_);
  if (input.size(0) != total(send_counts))
    refuse(name_, "all_to_all", std::to_string(input.size(0)) + " rows, but the send counts add up to " +
           std::to_string(total(send_counts)), "they must agree");
  if (send_counts[rank_] != recv_counts[rank_])
    refuse(name_, "all_to_all", "this rank sends itself " + std::to_string(send_counts[rank_]) + " rows but expects " +
           std::to_string(recv_counts[rank_]), "they must agree");
  return do_all_to_all(input, send_counts, recv_counts);
}

void Communicator::broadcast(at::Tensor& x, int root) {
  checked(x, "broadcast");
  at::NoGradGuard no_grad;
  if (!x.is_contiguous()) refuse(name_, "broadcast", "the tensor is not contiguous", "give a contiguous one");
  if (root < 0 || root >= size_)
    refuse(name_, "broadcast", "root " + std::to_string(root) + " of " + std::to_string(size_) + " ranks",
           "ranks count from 0");
  at::Tensor target = x.detach();
  do_broadcast(target, root);
}

void Communicator::barrier() { do_barrier(); }

std::vector<std::string> Communicator::all_gather_text(const std::string& text) {
  at::Tensor bytes = at::empty({static_cast<int64_t>(text.size())}, at::TensorOptions(at::kByte));
  std::memcpy(bytes.data_ptr(), text.data(), text.size());
  std::vector<std::string> texts;
  for (const at::Tensor& gathered : all_gather_ragged(bytes))
    texts.emplace_back(static_cast<const char*>(gathered.data_ptr()), gathered.numel());
  return texts;
}

}  // namespace dsa
