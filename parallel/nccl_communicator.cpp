#include "parallel/nccl_communicator.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <numeric>
#include <utility>

#include "parallel/nccl_api.h"
#include "parallel/pieces.h"

namespace dsa {

namespace {

// Below this an all-reduce gathers everything and adds on every rank: one exchange instead of two, the same bits.
constexpr int64_t kSmallReduceBytes = int64_t{1} << 20;
// Ranges of elements that ranks reduce begin at multiples of this: NCCL copies unaligned addresses slowly.
constexpr int64_t kRangeElements = 256;
constexpr std::chrono::milliseconds kWatchPeriod(200);

/// Streams and events without a word of CUDA: LibTorch's own, of whatever device this is.
const c10::impl::DeviceGuardImplInterface& streams_of(at::Device device) {
  return *c10::impl::getDeviceGuardImpl(device.type());
}

cudaStream_t handle(const c10::Stream& stream) { return static_cast<cudaStream_t>(stream.native_handle()); }

}  // namespace

NcclCommunicator::NcclCommunicator(std::unique_ptr<MpiCommunicator> host, at::Device device,
                                   std::chrono::milliseconds deadline)
    : Communicator(host->name(), host->rank(), host->size(), device),
      host_(std::move(host)),
      device_(device),
      deadline_(deadline),
      stream_(streams_of(device).getStreamFromGlobalPool(device, /*isHighPriority=*/true)) {}

NcclCommunicator::~NcclCommunicator() {
  if (watcher_.joinable()) {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    watcher_.join();
  }
  // Closing is collective: while an exception passes the other ranks may never come.
  if (!comm_ || std::uncaught_exceptions() > 0) return;
  try {
    const std::lock_guard lock(mutex_);
    settle(nccl_api().comm_finalize(comm_), "closing");
    must(nccl_api().comm_destroy(comm_), "closing");
  } catch (const CommunicationFailure& e) {
    std::fprintf(stderr, "warning: %s\n", e.what());
  }
}

void NcclCommunicator::must(int result, const std::string& what) const {
  if (result == ncclSuccess || result == ncclInProgress) return;
  throw CommunicationFailure(what + " failed in the " + name() + " group on its rank " + std::to_string(rank()) +
                             " (NCCL says: " + nccl_api().get_error_string(static_cast<ncclResult_t>(result)) + "; " +
                             nccl_api().get_last_error(comm_) +
                             ") look for an earlier message of another rank; NCCL_DEBUG=WARN tells more");
}

std::string NcclCommunicator::stands_still(const std::string& what) const {
  return what + " of the " + name() + " group stands still on its rank " + std::to_string(rank()) + " (" +
         std::to_string(deadline_.count() / 1000) +
         " s went by) a rank has died or hangs: look for an earlier message; where ranks need longer, raise "
         "parallel.deadline";
}

void NcclCommunicator::settle(int result, const std::string& what) const {
  must(result, what);
  const Clock::time_point begin = Clock::now();
  ncclResult_t state = ncclInProgress;
  while (true) {
    must(nccl_api().comm_get_async_error(comm_, &state), what);
    must(state, what);
    if (state == ncclSuccess) return;
    const Clock::duration waited = Clock::now() - begin;
    if (waited > deadline_) throw CommunicationFailure(stands_still(what));
    if (waited > std::chrono::milliseconds(1)) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

void NcclCommunicator::open() {
  if (comm_) return;
  ncclUniqueId id = {};
  if (rank() == 0) must(nccl_api().get_unique_id(&id), "opening");
  at::Tensor bytes = at::empty({static_cast<int64_t>(sizeof id)}, at::TensorOptions(at::kByte));
  std::memcpy(bytes.data_ptr(), &id, sizeof id);
  host_->broadcast(bytes, 0);
  std::memcpy(&id, bytes.data_ptr(), sizeof id);
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  settle(nccl_api().comm_init_rank_config(&comm_, size(), id, rank(), &config), "opening");
  watcher_ = std::thread([this] { watch(); });
}

NcclCommunicator::Done NcclCommunicator::enqueue(const std::string& call, const std::function<void()>& issue,
                                                 const std::function<void()>& meanwhile) {
  const std::lock_guard lock(mutex_);
  open();
  const c10::Stream current = streams_of(device_).getStream(device_);
  c10::Event ready(device_.type());
  const Done done = std::make_shared<c10::Event>(device_.type());
  ready.record(current);
  ready.block(stream_);
  must(nccl_api().group_start(), call);
  issue();
  settle(nccl_api().group_end(), call);  // only now the work is in the stream
  done->record(stream_);
  running_.push_back({call, done, Clock::now()});
  meanwhile();
  return done;
}

void NcclCommunicator::wait(const Done& done) const { done->block(streams_of(device_).getStream(device_)); }

void NcclCommunicator::watch() {
  streams_of(device_).setDevice(device_);  // a new thread starts on GPU 0
  std::unique_lock lock(mutex_);
  Clock::time_point moved = Clock::now();
  while (!wake_.wait_for(lock, kWatchPeriod, [this] { return stopping_; })) {
    try {
      for (; !running_.empty() && running_.front().done->query(); moved = Clock::now()) running_.pop_front();
    } catch (const std::exception&) {
      return;  // the GPU itself failed: the calling thread hears of it too
    }
    ncclResult_t state = ncclSuccess;
    nccl_api().comm_get_async_error(comm_, &state);
    if (state != ncclSuccess && state != ncclInProgress)
      leave("the " + name() + " group broke on its rank " + std::to_string(rank()) + " (NCCL says: " +
            nccl_api().get_error_string(state) + "; " + nccl_api().get_last_error(comm_) +
            ") look for an earlier message of another rank; NCCL_DEBUG=WARN tells more");
    if (!running_.empty() && Clock::now() - std::max(moved, running_.front().since) > deadline_)
      leave(stands_still(running_.front().call));
  }
}

void NcclCommunicator::leave(const std::string& problem) const {
  std::fprintf(stderr, "error: %s\n", problem.c_str());
  std::_Exit(kExitCommunication);
}

NcclCommunicator::Done NcclCommunicator::exchange(const std::string& call, const std::vector<at::Tensor>& send,
                                                  const std::vector<at::Tensor>& recv) {
  const auto issue = [&] {
    for (int step = 1; step < size(); ++step) {
      const int target = (rank() + step) % size(), source = (rank() - step + size()) % size();
      if (send[target].nbytes() > 0)
        must(nccl_api().send(send[target].data_ptr(), send[target].nbytes(), ncclInt8, target, comm_, handle(stream_)), call);
      if (recv[source].nbytes() > 0)
        must(nccl_api().recv(recv[source].data_ptr(), recv[source].nbytes(), ncclInt8, source, comm_, handle(stream_)), call);
    }
  };
  return enqueue(call, issue, [&] {
    if (recv[rank()].defined()) recv[rank()].copy_(send[rank()]);
  });
}

at::Tensor NcclCommunicator::do_all_gather_v(const at::Tensor& x, const std::vector<int64_t>& counts) {
  if (x.device() != device_) return host_->all_gather_v(x, counts);
  std::string call = describe_call("all_gather", x, /*rows_may_differ=*/true);
  for (int64_t count : counts) call += " " + std::to_string(count);
  host_->agree_on(call);
  at::Tensor y = rows_like(x, std::accumulate(counts.begin(), counts.end(), int64_t{0}));
  if (y.nbytes() == 0) return y;
  if (std::adjacent_find(counts.begin(), counts.end(), std::not_equal_to<>()) == counts.end()) {
    wait(enqueue(call, [&] {
      must(nccl_api().all_gather(x.data_ptr(), y.data_ptr(), x.nbytes(), ncclInt8, comm_, handle(stream_)), call);
    }, [] {}));
    return y;
  }
  wait(exchange(call, std::vector<at::Tensor>(size(), x), y.split_with_sizes(counts)));
  return y;
}

at::Tensor NcclCommunicator::do_reduce_scatter(const at::Tensor& x) {
  if (x.device() != device_) return host_->reduce_scatter(x);
  const std::string call = describe_call("reduce_scatter", x);
  host_->agree_on(call);
  const int64_t rows = x.size(0) / size();
  const std::vector<at::Tensor> send = x.split_with_sizes(std::vector<int64_t>(size(), rows));
  std::vector<at::Tensor> pieces(size());
  for (int r = 0; r < size(); ++r)
    if (r != rank()) pieces[r] = rows_like(x, rows);
  wait(exchange(call, send, pieces));
  pieces[rank()] = send[rank()];
  return combine_in_rank_order(pieces, Reduction::SUM);
}

at::Tensor NcclCommunicator::do_all_reduce(const at::Tensor& x, Reduction reduction) {
  if (x.device() != device_) return host_->all_reduce(x, reduction);
  const std::string call = describe_call(reduction, x);
  host_->agree_on(call);
  const int64_t n = x.numel();
  const at::Tensor flat = x.view({-1});
  std::vector<at::Tensor> pieces(size());
  if (static_cast<int64_t>(x.nbytes()) <= kSmallReduceBytes) {
    for (int r = 0; r < size(); ++r)
      if (r != rank()) pieces[r] = at::empty_like(flat);
    wait(exchange(call, std::vector<at::Tensor>(size(), flat), pieces));
    pieces[rank()] = flat;
    return combine_in_rank_order(pieces, reduction).view(x.sizes());
  }
  // Each rank reduces its range of elements, then all gather the ranges.
  const int64_t length = (n / size() / kRangeElements + 1) * kRangeElements;
  std::vector<int64_t> lengths;
  for (int r = 0; r < size(); ++r) lengths.push_back(std::clamp<int64_t>(n - r * length, 0, length));
  const std::vector<at::Tensor> send = flat.split_with_sizes(lengths);
  for (int r = 0; r < size(); ++r)
    if (r != rank()) pieces[r] = at::empty_like(send[rank()]);
  wait(exchange(call, send, pieces));
  pieces[rank()] = send[rank()];
  const at::Tensor reduced = combine_in_rank_order(pieces, reduction);
  at::Tensor y = at::empty_like(flat);
  wait(exchange(call, std::vector<at::Tensor>(size(), reduced), y.split_with_sizes(lengths)));
  return y.view(x.sizes());
}

Transfer NcclCommunicator::do_all_to_all(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                                         const std::vector<int64_t>& recv_counts) {
  if (x.device() != device_) return host_->start_all_to_all(x, send_counts, recv_counts);
  const std::string call = describe_call("all_to_all", x, /*rows_may_differ=*/true);
  host_->agree_on(call, send_counts, recv_counts);
  at::Tensor y = rows_like(x, std::accumulate(recv_counts.begin(), recv_counts.end(), int64_t{0}));
  Done done = exchange(call, x.split_with_sizes(send_counts), y.split_with_sizes(recv_counts));
  return {x, y, std::move(done)};
}

void NcclCommunicator::do_broadcast(at::Tensor& x, int root) {
  if (x.device() != device_) return host_->broadcast(x, root);
  const std::string call = describe_call("broadcast", x) + " from " + std::to_string(root);
  host_->agree_on(call);
  if (x.nbytes() == 0) return;
  wait(enqueue(call, [&] {
    must(nccl_api().broadcast(x.data_ptr(), x.data_ptr(), x.nbytes(), ncclInt8, root, comm_, handle(stream_)), call);
  }, [] {}));
}

void NcclCommunicator::do_barrier() { host_->barrier(); }

}  // namespace dsa
