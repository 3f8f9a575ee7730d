// One contract, every implementation: the suite runs with the local communicator, with MPI's (plain, with call
// checking, and with messages cut into 61-byte pieces) and, where every rank has a GPU, with NCCL's (tensors of the GPU
// and of the host, and with call checking) in worlds of 1, 2 and 4 ranks. Built with DSA_NCCL_STANDIN it runs NCCL's over
// a stand-in for NCCL and GPUs instead (nccl_standin.h).
#include "parallel/communicator.h"

#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>

#include "parallel/local_communicator.h"
#include "parallel/mpi_communicator.h"
#ifdef DSA_HAVE_NCCL
#include "parallel/nccl_communicator.h"
#endif
#include "tests/parallel/devices.h"
#include "tests/parallel/expected.h"
#ifdef DSA_NCCL_STANDIN
#include "tests/parallel/nccl_standin.h"
#endif
#include "tests/parallel/tensors.h"

namespace dsa {
namespace {

using test::expected_sum;
using test::same_bits;

enum class Kind { LOCAL, MPI, MPI_CHECKED, MPI_PIECES, NCCL, NCCL_CHECKED, NCCL_HOST };

MPI_Comm duplicate_world() {
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &comm);
  return comm;
}

/// Where the tensors of NCCL's communicators lie; nothing when this machine cannot.
std::optional<at::Device> nccl_device() {
#ifdef DSA_NCCL_STANDIN
  test::stand_in_for_gpus(DSA_NCCL_STANDIN);
  return at::kCPU;
#else
  return test::gpu_of_rank();
#endif
}

std::unique_ptr<Communicator> make_nccl([[maybe_unused]] bool check_calls) {
#ifdef DSA_HAVE_NCCL
  if (const auto gpu = nccl_device())
    return std::make_unique<NcclCommunicator>(std::make_unique<MpiCommunicator>(duplicate_world(), "test", check_calls),
                                              *gpu);
#endif
  return nullptr;
}

/// Nothing when this machine cannot.
std::unique_ptr<Communicator> make(Kind kind) {
  switch (kind) {
    case Kind::LOCAL: return std::make_unique<LocalCommunicator>();
    case Kind::MPI: return std::make_unique<MpiCommunicator>(duplicate_world(), "test");
    case Kind::MPI_CHECKED: return std::make_unique<MpiCommunicator>(duplicate_world(), "test", true);
    case Kind::MPI_PIECES: return std::make_unique<MpiCommunicator>(duplicate_world(), "test", false, 61);
    case Kind::NCCL: return make_nccl(false);
    case Kind::NCCL_CHECKED: return make_nccl(true);
    case Kind::NCCL_HOST: return make_nccl(false);
  }
  return nullptr;
}

const std::vector<at::ScalarType> kDtypes = {at::kBFloat16, at::kHalf, at::kFloat, at::kDouble,
                                             at::kInt,      at::kLong, at::kByte};

std::string label(const testing::TestParamInfo<Kind>& info) {
  static const char* kLabels[] = {"Local", "Mpi", "MpiChecked", "MpiPieces", "Nccl", "NcclChecked", "NcclHost"};
  return kLabels[static_cast<size_t>(info.param)];
}

class Contract : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    const Kind kind = GetParam();
    std::unique_ptr<Communicator>& kept = kind >= Kind::NCCL ? shared_[kind == Kind::NCCL_CHECKED] : own_;
    if (!kept) kept = make(kind);
    comm_ = kept.get();
    if (!comm_) GTEST_SKIP() << test::kNoGpus;
    rank_ = comm_->rank(), size_ = comm_->size();
    if (GetParam() == Kind::NCCL || GetParam() == Kind::NCCL_CHECKED) device_ = *nccl_device();
  }

  /// test::filled where this communicator's tensors lie.
  at::Tensor filled(const std::vector<int64_t>& shape, at::ScalarType dtype, uint64_t seed) const {
    return test::filled(shape, dtype, seed).to(device_);
  }
  at::Tensor uninitialised(const std::vector<int64_t>& shape, at::ScalarType dtype = at::kFloat) const {
    return at::empty(shape, at::TensorOptions(dtype).device(device_));
  }

  static void TearDownTestSuite() {  // before MPI ends
    for (auto& comm : shared_) comm.reset();
  }

  // NCCL takes a second to open: its tests share one communicator without and one with call checking.
  inline static std::array<std::unique_ptr<Communicator>, 2> shared_;
  std::unique_ptr<Communicator> own_;
  Communicator* comm_ = nullptr;
  int rank_ = 0, size_ = 1;
  at::Device device_ = at::kCPU;

  /// Every rank's tensor of this shape.
  std::vector<at::Tensor> everyones(const std::vector<int64_t>& shape, at::ScalarType dtype) const {
    std::vector<at::Tensor> all;
    for (int r = 0; r < size_; ++r) all.push_back(test::filled(shape, dtype, r));
    return all;
  }
};

TEST_P(Contract, AllGatherJoinsRowsByRank) {
  for (at::ScalarType dtype : kDtypes)
    for (const std::vector<int64_t>& shape : {std::vector<int64_t>{3, 2}, {0, 5}, {4}, {1, 2, 3}, {2, 0}}) {
      const std::vector<at::Tensor> inputs = everyones(shape, dtype);
      const at::Tensor y = comm_->all_gather(inputs[rank_].to(device_));
      EXPECT_EQ(y.device(), device_);
      EXPECT_EQ(y.size(0), size_ * shape[0]);
      for (int r = 0; r < size_; ++r)
        EXPECT_TRUE(same_bits(y.narrow(0, r * shape[0], shape[0]), inputs[r])) << dtype << " rank " << r;
    }
}

TEST_P(Contract, NonContiguousArgumentsAreMadeContiguous) {
  const at::Tensor x = filled({3, 4}, at::kFloat, rank_).transpose(0, 1);
  const at::Tensor y = comm_->all_gather(x);
  EXPECT_TRUE(y.is_contiguous());
  for (int r = 0; r < size_; ++r)
    EXPECT_TRUE(same_bits(y.narrow(0, 4 * r, 4), filled({3, 4}, at::kFloat, r).transpose(0, 1)));
}

TEST_P(Contract, AllGatherOfUnequalRows) {
  std::vector<int64_t> counts;
  for (int r = 0; r < size_; ++r) counts.push_back(2 * r);  // rank 0 has none
  const at::Tensor mine = filled({counts[rank_], 3}, at::kBFloat16, rank_);
  const at::Tensor joined = comm_->all_gather_v(mine, counts);
  const std::vector<at::Tensor> pieces = comm_->all_gather_ragged(mine);
  ASSERT_EQ(static_cast<int>(pieces.size()), size_);
  int64_t row = 0;
  for (int r = 0; r < size_; ++r) {
    const at::Tensor expected = filled({counts[r], 3}, at::kBFloat16, r);
    EXPECT_TRUE(same_bits(joined.narrow(0, row, counts[r]), expected));
    EXPECT_TRUE(same_bits(pieces[r], expected));
    row += counts[r];
  }
}

TEST_P(Contract, ReduceScatterSumsInRankOrder) {
  for (at::ScalarType dtype : kDtypes)
    for (int64_t rows : {0, 1, 257}) {
      const at::Tensor total = expected_sum(everyones({size_ * rows, 3}, dtype));
      const at::Tensor y = comm_->reduce_scatter(filled({size_ * rows, 3}, dtype, rank_));
      EXPECT_TRUE(same_bits(y, total.narrow(0, rank_ * rows, rows))) << dtype << " " << rows;
    }
}

TEST_P(Contract, AllReduceSumsInRankOrder) {
  for (at::ScalarType dtype : kDtypes)
    for (const std::vector<int64_t>& shape : {std::vector<int64_t>{}, {0}, {5}, {5003}, {97, 61}}) {
      const at::Tensor y = comm_->all_reduce(filled(shape, dtype, rank_));
      EXPECT_TRUE(same_bits(y, expected_sum(everyones(shape, dtype)))) << dtype << " " << y.numel();
    }
}

TEST_P(Contract, HalfPrecisionSumsRoundOnce) {
  // 1 + 2^-8 + 2^-8 (+ ...): bf16 sums rounded at every step would stay at 1.
  at::Tensor x = uninitialised({1}, at::kBFloat16);
  x.fill_(rank_ == 0 ? 1.0 : std::ldexp(1.0, -8));
  const float expected = static_cast<float>(at::BFloat16(static_cast<float>(1.0 + (size_ - 1) * std::ldexp(1.0, -8))));
  EXPECT_EQ(comm_->all_reduce(x).item<float>(), expected);
  if (size_ == 4) {
    EXPECT_GT(expected, 1.0f);
  }
}

TEST_P(Contract, MaxAndMin) {
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kLong})
    for (int64_t n : {3, 9001}) {
      const at::Tensor high = comm_->all_reduce(filled({n}, dtype, rank_), Reduction::MAX);
      const at::Tensor low = comm_->all_reduce(filled({n}, dtype, rank_), Reduction::MIN);
      std::vector<double> most(n, -1e30), least(n, 1e30);
      for (const at::Tensor& t : everyones({n}, dtype)) {
        const std::vector<double> v = test::values(t);
        for (int64_t i = 0; i < n; ++i) most[i] = std::max(most[i], v[i]), least[i] = std::min(least[i], v[i]);
      }
      EXPECT_EQ(test::values(high), most);
      EXPECT_EQ(test::values(low), least);
    }
  at::Tensor x = filled({4}, at::kFloat, rank_);
  if (rank_ == size_ - 1) x[2] = std::numeric_limits<float>::quiet_NaN();
  for (Reduction reduction : {Reduction::SUM, Reduction::MAX, Reduction::MIN}) {
    const std::vector<double> v = test::values(comm_->all_reduce(x, reduction));
    for (int i = 0; i < 4; ++i) EXPECT_EQ(std::isnan(v[i]), i == 2);
  }
}

TEST_P(Contract, AllToAllMovesRows) {
  auto rows = [](int from, int to) { return int64_t{(3 * from + 5 * to) % 4}; };
  for (at::ScalarType dtype : kDtypes) {
    auto sent_by = [&](int from) {
      int64_t n = 0;
      for (int to = 0; to < size_; ++to) n += rows(from, to);
      return filled({n, 3}, dtype, 50 + from);
    };
    std::vector<int64_t> send, recv;
    for (int r = 0; r < size_; ++r) send.push_back(rows(rank_, r)), recv.push_back(rows(r, rank_));
    const at::Tensor y = comm_->all_to_all(sent_by(rank_), send, recv);
    int64_t row = 0;
    for (int from = 0; from < size_; ++from) {
      int64_t start = 0;
      for (int to = 0; to < rank_; ++to) start += rows(from, to);
      EXPECT_TRUE(same_bits(y.narrow(0, row, recv[from]), sent_by(from).narrow(0, start, recv[from])));
      row += recv[from];
    }
    EXPECT_EQ(y.size(0), row);
  }
}

// Several under way at once, waited for in another order, one dropped; what is computed meanwhile disturbs none.
TEST_P(Contract, TransfersBesideOtherWork) {
  constexpr int kTransfers = 4;
  const int64_t rows = 1000;
  const std::vector<int64_t> counts(size_, rows);
  for (int round = 0; round < 3; ++round) {
    std::vector<Transfer> under_way;
    at::Tensor other = filled({64, 64}, at::kFloat, 1);
    for (int i = 0; i < kTransfers; ++i) {
      const at::Tensor x = filled({size_ * rows, 7}, at::kFloat, 100 * i + rank_);
      under_way.push_back(comm_->start_all_to_all(x, counts, counts));
      for (int k = 0; k < 20; ++k) other = other.mm(other).clamp(-1, 1);
    }
    under_way.erase(under_way.begin() + 1);
    for (const int i : {3, 0, 2}) {
      Transfer& transfer = under_way[i > 1 ? i - 1 : i];
      EXPECT_EQ(transfer.result().sizes(), (std::vector<int64_t>{size_ * rows, 7}));
      const at::Tensor y = transfer.wait();
      for (int from = 0; from < size_; ++from)
        EXPECT_TRUE(same_bits(
            y.narrow(0, from * rows, rows),
            test::filled({size_ * rows, 7}, at::kFloat, 100 * i + from).narrow(0, rank_ * rows, rows)));
    }
  }
}

TEST_P(Contract, AllToAllWithoutAnyRow) {
  const std::vector<int64_t> none(size_, 0);
  EXPECT_EQ(comm_->all_to_all(uninitialised({0, 4}), none, none).sizes(), (std::vector<int64_t>{0, 4}));
}

TEST_P(Contract, BroadcastFromEveryRoot) {
  for (int root = 0; root < size_; ++root) {
    at::Tensor x = filled({5, 3}, at::kDouble, rank_);
    comm_->broadcast(x, root);
    EXPECT_TRUE(same_bits(x, filled({5, 3}, at::kDouble, root)));
    at::Tensor empty = uninitialised({0});
    comm_->broadcast(empty, root);
  }
}

TEST_P(Contract, TextsOfAnyLength) {
  const std::vector<std::string> texts =
      comm_->all_gather_text(std::string(static_cast<size_t>(3 * rank_), 'x') + (rank_ ? std::string("\0ä", 3) : ""));
  ASSERT_EQ(static_cast<int>(texts.size()), size_);
  for (int r = 0; r < size_; ++r)
    EXPECT_EQ(texts[r], std::string(static_cast<size_t>(3 * r), 'x') + (r ? std::string("\0ä", 3) : ""));
  comm_->barrier();
}

TEST_P(Contract, ResultsAreFresh) {
  const at::Tensor x = filled({4 * size_, 2}, at::kFloat, rank_), before = x.clone();
  std::vector<int64_t> counts(size_, 4);
  for (at::Tensor y : {comm_->all_gather(x), comm_->all_reduce(x), comm_->reduce_scatter(x),
                       comm_->all_to_all(x, counts, counts)})
    y.fill_(7);
  EXPECT_TRUE(same_bits(x, before));
}

TEST_P(Contract, RepeatsAreBitEqual) {
  const at::Tensor x = filled({size_ * 700, 3}, at::kBFloat16, rank_);
  const at::Tensor sum = comm_->all_reduce(x), part = comm_->reduce_scatter(x);
  for (int i = 0; i < 20; ++i) {
    EXPECT_TRUE(same_bits(comm_->all_reduce(x), sum));
    EXPECT_TRUE(same_bits(comm_->reduce_scatter(x), part));
  }
  const at::Tensor all = comm_->all_gather(sum);
  for (int r = 0; r < size_; ++r) EXPECT_TRUE(same_bits(all.narrow(0, r * sum.size(0), sum.size(0)), sum));
}

// Big enough for several NCCL channels and ranges that do not divide evenly; results are used in stream order.
TEST_P(Contract, LargeTensorsInARow) {
  const int64_t n = GetParam() == Kind::MPI_PIECES ? 10'003 : 1'000'003, width = n / 3000;
  at::Tensor x = filled({n}, at::kBFloat16, rank_);
  const at::Tensor sum = comm_->all_reduce(x);
  x.zero_();  // after the sum has read it
  const at::Tensor again = comm_->all_gather(sum.add(1)).narrow(0, (size_ - 1) * n, n).sub(1).add(0);
  EXPECT_TRUE(same_bits(sum, expected_sum(everyones({n}, at::kBFloat16))));
  EXPECT_TRUE(same_bits(again, sum.add(1).sub(1)));
  std::vector<int64_t> counts;
  int64_t rows = 0;
  for (int r = 0; r < size_; ++r) counts.push_back(1000 * (r + 1) + 7), rows += counts.back();
  const at::Tensor joined = comm_->all_gather_v(filled({counts[rank_], width}, at::kBFloat16, rank_), counts);
  for (int r = 0, row = 0; r < size_; row += static_cast<int>(counts[r++]))
    EXPECT_TRUE(same_bits(joined.narrow(0, row, counts[r]), test::filled({counts[r], width}, at::kBFloat16, r)));
}

TEST_P(Contract, ContradictoryArgumentsAreRefused) {
  const at::Tensor x = filled({3, 2}, at::kFloat, 0);
  EXPECT_THROW(comm_->all_gather(at::Tensor()), std::invalid_argument);
  EXPECT_THROW(comm_->all_gather(x.sum()), std::invalid_argument);
  EXPECT_THROW(comm_->all_gather_v(x, std::vector<int64_t>(size_, 2)), std::invalid_argument);
  EXPECT_THROW(comm_->all_gather_v(x, std::vector<int64_t>(size_ + 1, 3)), std::invalid_argument);
  EXPECT_THROW(comm_->all_to_all(x, std::vector<int64_t>(size_, 4), std::vector<int64_t>(size_, 4)),
               std::invalid_argument);
  if (size_ > 1) {
    EXPECT_THROW(comm_->reduce_scatter(x), std::invalid_argument);  // 3 rows over 2 or 4 ranks
  }
  at::Tensor y = x.clone();
  EXPECT_THROW(comm_->broadcast(y, size_), std::invalid_argument);
  at::Tensor weight = x.clone().requires_grad_(true);
  EXPECT_THROW(comm_->all_reduce(weight), std::invalid_argument);
  at::NoGradGuard no_grad;
  EXPECT_NO_THROW(comm_->all_reduce(weight));
}

#ifdef DSA_NCCL_STANDIN
INSTANTIATE_TEST_SUITE_P(Standin, Contract, testing::Values(Kind::NCCL, Kind::NCCL_CHECKED), label);
#else
INSTANTIATE_TEST_SUITE_P(Communicators, Contract,
                         testing::Values(Kind::LOCAL, Kind::MPI, Kind::MPI_CHECKED, Kind::MPI_PIECES, Kind::NCCL,
                                         Kind::NCCL_CHECKED, Kind::NCCL_HOST),
                         label);
#endif

}  // namespace
}  // namespace dsa
