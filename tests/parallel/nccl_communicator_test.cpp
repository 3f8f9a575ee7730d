// What the contract suite cannot see of NCCL's communicator, over stand-ins: the order of streams and events, and
// the end of waiting for a rank.
#include "parallel/nccl_communicator.h"

#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>

#include "tests/parallel/nccl_standin.h"
#include "tests/parallel/tensors.h"

namespace dsa {
namespace {

using test::filled;

class Nccl : public testing::Test {
 protected:
  std::unique_ptr<NcclCommunicator> make(std::chrono::milliseconds deadline = kDefaultDeadline) {
    MPI_Comm comm = MPI_COMM_NULL;
    MPI_Comm_dup(MPI_COMM_WORLD, &comm);
    auto host = std::make_unique<MpiCommunicator>(comm, "test", false, kLongestMessage, deadline);
    return std::make_unique<NcclCommunicator>(std::move(host), at::kCPU, deadline);
  }
  test::StandinStreams& streams_ = test::stand_in_for_gpus(DSA_NCCL_STANDIN);
};

TEST_F(Nccl, StreamsWaitForEachOther) {
  const auto comm = make();
  const int n = comm->size();
  const at::Tensor x = filled({2 * n, 3}, at::kFloat, comm->rank());
  at::Tensor y = x.clone();
  const std::vector<int64_t> twos(n, 2);
  std::vector<int64_t> rising;
  for (int r = 0; r < n; ++r) rising.push_back(r + 1);
  const at::Tensor large = filled({600'000}, at::kFloat, comm->rank());  // an all-reduce of two exchanges
  const std::vector<std::pair<const char*, std::function<void()>>> calls = {
      {"all_gather", [&] { comm->all_gather(x); }},
      {"all_gather_v", [&] { comm->all_gather_v(x.narrow(0, 0, comm->rank() + 1), rising); }},
      {"reduce_scatter", [&] { comm->reduce_scatter(x); }},
      {"all_reduce", [&] { comm->all_reduce(x); }},
      {"large all_reduce", [&] { comm->all_reduce(large); }},
      {"all_to_all", [&] { comm->all_to_all(x, twos, twos); }},
      {"broadcast", [&] { comm->broadcast(y, 0); }}};
  for (const auto& [name, call] : calls) {
    streams_.log.clear();
    call();
    // Per exchange: the communicator's stream waits for the current one, works, and the current one waits for it.
    size_t at = 0;
    int exchanges = 0;
    while (at + 4 <= streams_.log.size() && ++exchanges) {
      const auto number = [&](const std::string& line) { return line.substr(7, line.find(' ', 7) - 7); };
      const std::string ready = number(streams_.log[at]);
      EXPECT_EQ(streams_.log[at++], "record " + ready + " on 0") << name;
      EXPECT_EQ(streams_.log[at++], "stream 1 waits for " + ready) << name;
      while (at < streams_.log.size() && streams_.log[at] == "enqueue on 1") ++at;
      if (at + 2 > streams_.log.size()) break;
      const std::string done = number(streams_.log[at]);
      EXPECT_EQ(streams_.log[at++], "record " + done + " on 1") << name;
      EXPECT_EQ(streams_.log[at++], "stream 0 waits for " + done) << name;
    }
    EXPECT_EQ(at, streams_.log.size()) << name;
    EXPECT_EQ(exchanges, std::string(name) == "large all_reduce" ? 2 : 1) << name;
  }
}

TEST_F(Nccl, TheCurrentStreamWaitsWhenTheTransferIsAskedTo) {
  const auto comm = make();
  const std::vector<int64_t> twos(comm->size(), 2);
  const at::Tensor x = filled({2 * comm->size(), 3}, at::kFloat, comm->rank());
  for (const bool dropped : {false, true}) {
    const auto waits = [&] {
      return std::count_if(streams_.log.begin(), streams_.log.end(),
                           [](const std::string& line) { return line.starts_with("stream 0 waits for"); });
    };
    streams_.log.clear();
    Transfer first = comm->start_all_to_all(x, twos, twos), second = comm->start_all_to_all(x, twos, twos);
    EXPECT_EQ(waits(), 0);
    if (dropped) second = Transfer();
    else EXPECT_TRUE(second.wait().defined());
    EXPECT_EQ(waits(), 1);
    EXPECT_TRUE(first.wait().defined());
    EXPECT_EQ(waits(), 2);
    EXPECT_FALSE(first.wait().defined());
    EXPECT_EQ(waits(), 2);
  }
}

TEST_F(Nccl, WhatMovesNothingTouchesNoStream) {
  const auto comm = make();
  streams_.log.clear();
  comm->barrier();
  EXPECT_EQ(comm->all_gather(at::empty({0, 4})).size(0), 0);
  at::Tensor none = at::empty({0});
  comm->broadcast(none, 0);
  EXPECT_TRUE(streams_.log.empty());
}

TEST_F(Nccl, ARankThatDoesNotComeIsGivenUp) {
  const auto comm = make(std::chrono::milliseconds(400));
  if (comm->size() == 1) return;
  const at::Tensor x = filled({4}, at::kFloat, comm->rank());
  comm->all_reduce(x);  // opened, everybody there
  if (comm->rank() == 0) {
    std::string message;
    try {
      comm->all_reduce(x);
    } catch (const CommunicationFailure& e) {
      message = e.what();
    }
    EXPECT_NE(message.find("all_reduce SUM of Float [4] of the test group stands still on its rank 0"), std::string::npos)
        << message;
    EXPECT_NE(message.find("parallel.deadline"), std::string::npos);
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

}  // namespace
}  // namespace dsa
