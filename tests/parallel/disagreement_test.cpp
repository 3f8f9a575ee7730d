// Ranks that disagree, or do not come: what MPI's communicator notices, and what it says.
#include <gtest/gtest.h>

#include <chrono>
#include <stdexcept>
#include <string>

#include "parallel/mpi_communicator.h"
#include "tests/parallel/tensors.h"

namespace dsa {
namespace {

using test::filled;

MPI_Comm duplicate_world() {
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &comm);
  return comm;
}

class Disagreement : public testing::Test {
 protected:
  MpiCommunicator comm_{duplicate_world(), "test", /*check_calls=*/true};
  const bool odd_one_ = comm_.rank() == comm_.size() - 1;

  /// Every rank throws, the message holds `words`, and the group can go on.
  template <typename Call>
  void expect_all_throw(Call call, const std::string& words) {
    if (comm_.size() == 1) return;
    std::string message;
    try {
      call();
    } catch (const std::runtime_error& e) {
      message = e.what();
    }
    EXPECT_NE(message.find("disagree"), std::string::npos) << message;
    if (odd_one_) {
      EXPECT_NE(message.find(words), std::string::npos) << message;
    }
    EXPECT_EQ(comm_.all_reduce(filled({1}, at::kFloat, 0)).numel(), 1);
  }
};

TEST_F(Disagreement, IsSeenByAllBeforeDataMoves) {
  const int n = comm_.size();
  const at::Tensor x = filled({2 * n, 2}, at::kFloat, 1);
  expect_all_throw([&] { odd_one_ ? comm_.reduce_scatter(x) : comm_.all_reduce(x); }, "reduce_scatter of Float");
  expect_all_throw([&] { comm_.all_gather(odd_one_ ? x.to(at::kInt) : x); }, "all_gather of Int");
  expect_all_throw([&] { comm_.all_reduce(odd_one_ ? x.view({-1}) : x); }, "all_reduce SUM of Float");
  expect_all_throw([&] { comm_.all_reduce(x, odd_one_ ? Reduction::MAX : Reduction::MIN); }, "all_reduce MAX");
  expect_all_throw([&] { comm_.all_gather(odd_one_ ? x.narrow(0, 0, 1) : x); }, "all_gather");
  expect_all_throw([&] { odd_one_ ? comm_.barrier() : static_cast<void>(comm_.all_reduce(x)); }, "calls barrier");
  expect_all_throw([&] {
    at::Tensor y = x.clone();
    comm_.broadcast(y, odd_one_ ? 1 : 0);
  }, "broadcast");
  // The last rank expects 3 rows of rank 0, which sends 2.
  expect_all_throw([&] {
    std::vector<int64_t> send(n, 2), recv(n, 2);
    if (odd_one_) recv[0] = 3;
    comm_.all_to_all(x, send, recv);
  }, "rank 0 sends 2 rows, rank " + std::to_string(n - 1) + " expects 3");
}

TEST(Deadline, ARankThatDoesNotComeIsGivenUp) {
  const auto short_wait = std::chrono::milliseconds(300);
  // Not freed: after a missed deadline a communicator is unusable.
  auto* comm = new MpiCommunicator(duplicate_world(), "test", false, kLongestMessage, short_wait);
  if (comm->size() > 1 && comm->rank() == 0) {
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_THROW(comm->all_reduce(filled({4}, at::kFloat, 0)), CommunicationFailure);
    EXPECT_THROW(comm->barrier(), CommunicationFailure);
    const auto waited = std::chrono::steady_clock::now() - begin;
    EXPECT_GT(waited, 2 * short_wait);
    EXPECT_LT(waited, 20 * short_wait);
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

TEST(UncheckedDisagreement, OfSizesIsStillAnError) {
  // Not freed: after a failed exchange a communicator is unusable.
  auto* comm = new MpiCommunicator(duplicate_world(), "test");
  if (comm->size() > 1) {
    EXPECT_THROW(comm->all_reduce(filled({comm->rank() == 0 ? 8 : 4}, at::kFloat, 0)), std::runtime_error);
  }
}

}  // namespace
}  // namespace dsa
