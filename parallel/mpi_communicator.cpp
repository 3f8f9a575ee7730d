#include "parallel/mpi_communicator.h"

#include <sched.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <numeric>
#include <stdexcept>

#include "parallel/communication_failure.h"
#include "parallel/pieces.h"

namespace dsa {

namespace {

// Below this an all-reduce gathers everything and adds on every rank: one exchange instead of two, the same bits.
constexpr int64_t kSmallReduceBytes = 4096;

}  // namespace

MpiCommunicator::MpiCommunicator(MPI_Comm comm, std::string name, bool check_calls, int64_t max_message,
                                 std::chrono::milliseconds deadline)
    : Communicator(std::move(name), [comm] { int r; MPI_Comm_rank(comm, &r); return r; }(),
                   [comm] { int s; MPI_Comm_size(comm, &s); return s; }(), at::Device(at::kCPU)),
      comm_(comm), check_calls_(check_calls), max_message_(max_message), deadline_(deadline) {
  MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
}

MpiCommunicator::~MpiCommunicator() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  // Freeing is collective: while an exception passes the other ranks may never come.
  if (!finalized && std::uncaught_exceptions() == 0) MPI_Comm_free(&comm_);
}

void MpiCommunicator::must(int mpi_result, const char* what) const {
  if (mpi_result == MPI_SUCCESS) return;
  char reason[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(mpi_result, reason, &length);
  throw CommunicationFailure(std::string(what) + " failed in the " + name() + " group on its rank " +
                             std::to_string(rank()) + " (MPI says: " + std::string(reason, length) +
                             ") the ranks disagree about this call or one of them has died; look for an earlier error");
}

int MpiCommunicator::wait(MPI_Request& request, const char* what, MPI_Status* status) const {
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t turn = 1;; ++turn) {
    int done = 0;
    const int result = MPI_Test(&request, &done, status);
    if (done || result != MPI_SUCCESS) return result;
    sched_yield();  // ranks may share cores
    if (turn % 1024 == 0 && std::chrono::steady_clock::now() - begin > deadline_)
      throw CommunicationFailure(
          std::string(what) + " of the " + name() + " group stands still on its rank " + std::to_string(rank()) + " (" +
          std::to_string(deadline_.count() / 1000) + " s went by) a rank has died or hangs: look for an earlier message; "
          "where ranks need longer, raise parallel.deadline");
  }
}

void MpiCommunicator::exchange(const std::vector<Block>& send, const std::vector<Block>& recv) {
  if (send[rank()].bytes > 0) std::memcpy(recv[rank()].data, send[rank()].data, send[rank()].bytes);
  struct Expected {
    int source;
    int bytes;
  };
  std::vector<MPI_Request> requests;
  std::vector<Expected> expected;  // parallel to the receives, which come first in `requests`
  // An empty block is a message too: otherwise a rank that sends where nothing is expected would go unnoticed.
  auto for_messages = [&](const Block& block, auto&& post) {
    int64_t done = 0;
    do {
      const int bytes = static_cast<int>(std::min(max_message_, block.bytes - done));
      post(block.data + done, bytes);
      done += bytes;
    } while (done < block.bytes);
  };
  for (int step = 1; step < size(); ++step) {
    const int source = (rank() - step + size()) % size();
    for_messages(recv[source], [&](char* data, int bytes) {
      must(MPI_Irecv(data, bytes, MPI_BYTE, source, 0, comm_, &requests.emplace_back()), "receiving");
      expected.push_back({source, bytes});
    });
  }
  for (int step = 1; step < size(); ++step) {
    const int target = (rank() + step) % size();
    for_messages(send[target], [&](char* data, int bytes) {
      must(MPI_Isend(data, bytes, MPI_BYTE, target, 0, comm_, &requests.emplace_back()), "sending");
    });
  }
  // Every request is brought to its end before anything but a missed deadline is thrown: the buffers die with this
  // call. Tested one by one, because Open MPI 4.1's MPI_Waitall does not come back from a message that is longer than its buffer.
  std::string problem;
  int failure = MPI_SUCCESS;
  for (size_t i = 0; i < requests.size(); ++i) {
    MPI_Status status;
    const int result = wait(requests[i], "an exchange", &status);
    if (result != MPI_SUCCESS) failure = result;
    if (result != MPI_SUCCESS || i >= expected.size() || !problem.empty()) continue;
    int bytes = 0;
    MPI_Get_count(&status, MPI_BYTE, &bytes);
    if (bytes != expected[i].bytes)
      problem = "rank " + std::to_string(expected[i].source) + " sent " + std::to_string(bytes) + " bytes, rank " +
                std::to_string(rank()) + " expected " + std::to_string(expected[i].bytes);
  }
  must(failure, "an exchange");
  if (!problem.empty())
    throw CommunicationFailure("an exchange failed in the " + name() + " group (" + problem +
                             ") the ranks disagree about this call; run with call checking on to see both sides");
}

void MpiCommunicator::agree_on(const std::string& call, const std::vector<int64_t>& send_counts,
                                 const std::vector<int64_t>& recv_counts) {
  if (!check_calls_) return;
  constexpr size_t kText = 240;
  struct Header {
    int64_t rows;  // what the sender is about to send to the receiver of this header
    char text[kText];
  };
  Header mine = {};
  std::strncpy(mine.text, call.c_str(), kText - 1);
  std::vector<Header> out(size(), mine), in(size());
  for (size_t r = 0; r < send_counts.size(); ++r) out[r].rows = send_counts[r];
  std::vector<Block> send, recv;
  for (int r = 0; r < size(); ++r) {
    send.push_back({reinterpret_cast<char*>(&out[r]), sizeof(Header)});
    recv.push_back({reinterpret_cast<char*>(&in[r]), sizeof(Header)});
  }
  exchange(send, recv);
  std::string problem;
  for (int r = 0; r < size() && problem.empty(); ++r) {
    if (std::strcmp(in[r].text, mine.text) != 0)
      problem = "rank " + std::to_string(r) + " calls " + in[r].text + ", rank " + std::to_string(rank()) + " calls " +
                mine.text;
    else if (!recv_counts.empty() && in[r].rows != recv_counts[r])
      problem = call + ": rank " + std::to_string(r) + " sends " + std::to_string(in[r].rows) + " rows, rank " +
                std::to_string(rank()) + " expects " + std::to_string(recv_counts[r]);
  }
  // One rank's complaint stops all of them: nobody is left waiting for data.
  int bad = problem.empty() ? 0 : 1, any = 0;
  MPI_Request request;
  must(MPI_Iallreduce(&bad, &any, 1, MPI_INT, MPI_MAX, comm_, &request), "comparing calls");
  must(wait(request, "comparing calls"), "comparing calls");
  if (any)
    throw std::runtime_error("ranks of the " + name() + " group disagree (" +
                             (problem.empty() ? "seen by another rank during " + call : problem) +
                             ") all ranks of a group must make the same calls in the same order");
}

at::Tensor MpiCommunicator::do_all_gather_v(const at::Tensor& x, const std::vector<int64_t>& counts) {
  std::string call = describe_call("all_gather", x, /*rows_may_differ=*/true);
  for (int64_t count : counts) call += " " + std::to_string(count);
  agree_on(call);
  at::Tensor y = rows_like(x, std::accumulate(counts.begin(), counts.end(), int64_t{0}));
  const int64_t bytes = row_bytes(x);
  std::vector<Block> send, recv;
  char* to = static_cast<char*>(y.data_ptr());
  for (int64_t count : counts) {
    send.push_back({static_cast<char*>(x.data_ptr()), x.size(0) * bytes});
    recv.push_back({to, count * bytes});
    to += count * bytes;
  }
  exchange(send, recv);
  return y;
}

at::Tensor MpiCommunicator::do_reduce_scatter(const at::Tensor& x) {
  agree_on(describe_call("reduce_scatter", x));
  at::Tensor pieces = at::empty_like(x);
  const int64_t bytes = x.size(0) / size() * row_bytes(x);
  std::vector<Block> send, recv;
  for (int r = 0; r < size(); ++r) {
    send.push_back({static_cast<char*>(x.data_ptr()) + r * bytes, bytes});
    recv.push_back({static_cast<char*>(pieces.data_ptr()) + r * bytes, bytes});
  }
  exchange(send, recv);
  std::vector<int64_t> shape = x.sizes().vec();
  shape[0] /= size();
  return combine_in_rank_order(pieces.view({size(), x.numel() / size()}).unbind(0), Reduction::SUM).view(shape);
}

at::Tensor MpiCommunicator::do_all_reduce(const at::Tensor& x, Reduction reduction) {
  agree_on(describe_call(reduction, x));
  const int64_t n = x.numel(), item = static_cast<int64_t>(x.element_size());
  char* from = static_cast<char*>(x.data_ptr());
  std::vector<Block> send, recv;
  if (n * item <= kSmallReduceBytes) {
    at::Tensor pieces = at::empty({size(), n}, x.options());
    for (int r = 0; r < size(); ++r) {
      send.push_back({from, n * item});
      recv.push_back({static_cast<char*>(pieces.data_ptr()) + r * n * item, n * item});
    }
    exchange(send, recv);
    return combine_in_rank_order(pieces.unbind(0), reduction).view(x.sizes());
  }
  // Each rank reduces its range of elements, then all gather the ranges.
  at::Tensor y = at::empty_like(x);
  char* to = static_cast<char*>(y.data_ptr());
  const int64_t base = n / size(), longer = n % size();
  auto begin = [&](int r) { return r * base + std::min<int64_t>(r, longer); };
  const int64_t own = begin(rank() + 1) - begin(rank());
  at::Tensor pieces = at::empty({size(), own}, x.options());
  for (int r = 0; r < size(); ++r) {
    send.push_back({from + begin(r) * item, (begin(r + 1) - begin(r)) * item});
    recv.push_back({static_cast<char*>(pieces.data_ptr()) + r * own * item, own * item});
  }
  exchange(send, recv);
  const at::Tensor reduced = combine_in_rank_order(pieces.unbind(0), reduction);
  for (int r = 0; r < size(); ++r) {
    send[r] = {static_cast<char*>(reduced.data_ptr()), own * item};
    recv[r] = {to + begin(r) * item, (begin(r + 1) - begin(r)) * item};
  }
  exchange(send, recv);
  return y;
}

Transfer MpiCommunicator::do_all_to_all(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                                        const std::vector<int64_t>& recv_counts) {
  agree_on(describe_call("all_to_all", x, /*rows_may_differ=*/true), send_counts, recv_counts);
  at::Tensor y = rows_like(x, std::accumulate(recv_counts.begin(), recv_counts.end(), int64_t{0}));
  const int64_t bytes = row_bytes(x);
  char* from = static_cast<char*>(x.data_ptr());
  char* to = static_cast<char*>(y.data_ptr());
  std::vector<Block> send, recv;
  for (int r = 0; r < size(); ++r) {
    send.push_back({from, send_counts[r] * bytes});
    recv.push_back({to, recv_counts[r] * bytes});
    from += send_counts[r] * bytes;
    to += recv_counts[r] * bytes;
  }
  exchange(send, recv);
  return {x, y, nullptr};
}

void MpiCommunicator::do_broadcast(at::Tensor& x, int root) {
  agree_on(describe_call("broadcast", x) + " from " + std::to_string(root));
  char* data = static_cast<char*>(x.data_ptr());
  const int64_t bytes = static_cast<int64_t>(x.nbytes());
  for (int64_t done = 0; done < bytes; done += max_message_) {
    const int length = static_cast<int>(std::min(max_message_, bytes - done));
    MPI_Request request;
    must(MPI_Ibcast(data + done, length, MPI_BYTE, root, comm_, &request), "a broadcast");
    must(wait(request, "a broadcast"), "a broadcast");
  }
}

void MpiCommunicator::do_barrier() {
  agree_on("barrier");
  MPI_Request request;
  must(MPI_Ibarrier(comm_, &request), "a barrier");
  must(wait(request, "a barrier"), "a barrier");
}

}  // namespace dsa
