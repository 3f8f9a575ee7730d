#include "parallel/collectives.h"

#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <cmath>
#include <functional>
#include <memory>

#include "parallel/mesh.h"
#include "tests/parallel/devices.h"
#include "tests/parallel/tensors.h"

namespace dsa {
namespace {

int world_size() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

class Collectives : public testing::TestWithParam<test::On> {
 protected:
  void SetUp() override {
    const auto device = test::device_for(GetParam());
    if (!device) GTEST_SKIP() << test::kNoGpus;
    device_ = *device;
    mesh_ = std::make_unique<Mesh>(Degrees{.data = world_size()}, /*check_calls=*/true, device_);
    group_ = &mesh_->along(Axis::WORLD);
    rank_ = group_->rank(), size_ = group_->size();
  }

  at::Device device_ = at::kCPU;
  std::unique_ptr<Mesh> mesh_;
  Communicator* group_ = nullptr;
  int rank_ = 0, size_ = 1;

  at::Tensor filled(const std::vector<int64_t>& shape, at::ScalarType dtype, uint64_t seed) const {
    return test::filled(shape, dtype, seed).to(device_);
  }
  at::Tensor placed(const at::Tensor& x) const { return x.to(device_, x.scalar_type(), false, /*copy=*/true); }
  double everywhere(const at::Tensor& scalar) { return group_->all_reduce(scalar.detach()).item<double>(); }

  /// The transpose of a linear map A over all ranks together: <A x, v> = <x, A^T v>, with A^T v from backward.
  void expect_transposed(const std::function<at::Tensor(const at::Tensor&)>& map, at::Tensor x) {
    x.requires_grad_(true);
    const at::Tensor y = map(x);
    const at::Tensor v = filled(y.sizes().vec(), at::kDouble, 100 + rank_);
    const at::Tensor paired = y.mul(v).sum();
    paired.backward();
    ASSERT_TRUE(x.grad().defined());
    const double left = everywhere(paired), right = everywhere(x.detach().mul(x.grad()).sum());
    EXPECT_NEAR(left, right, 1e-12 * (1 + std::abs(left)));
    EXPECT_NE(left, 0.0);
  }
};

TEST_P(Collectives, BackwardIsTheTranspose) {
  expect_transposed([&](const at::Tensor& x) { return gather_rows(x, *group_); }, filled({3, 4}, at::kDouble, rank_));
  expect_transposed([&](const at::Tensor& x) { return reduce_scatter_rows(x, *group_); },
                    filled({3 * size_, 4}, at::kDouble, rank_));
  std::vector<int64_t> send, recv;
  int64_t rows = 0;
  for (int r = 0; r < size_; ++r) {
    send.push_back(1 + (rank_ + 2 * r) % 3), recv.push_back(1 + (r + 2 * rank_) % 3);
    rows += send.back();
  }
  expect_transposed([&](const at::Tensor& x) { return all_to_all_rows(x, send, recv, *group_); },
                    filled({rows, 4}, at::kDouble, rank_));
}

TEST_P(Collectives, CopyToSumsGradientsAndReduceFromPassesThem) {
  at::Tensor x = filled({5}, at::kDouble, 3).requires_grad_(true);
  const at::Tensor copied = copy_to(x, *group_);
  EXPECT_EQ(test::values(copied), test::values(x));
  copied.mul(filled({5}, at::kDouble, 10 + rank_)).sum().backward();
  at::Tensor expected = at::zeros({5}, at::TensorOptions(at::kDouble).device(device_));
  for (int r = 0; r < size_; ++r) expected.add_(filled({5}, at::kDouble, 10 + r));
  EXPECT_EQ(test::values(x.grad()), test::values(expected));

  at::Tensor part = filled({5}, at::kDouble, 20 + rank_).requires_grad_(true);
  const at::Tensor sum = reduce_from(part, *group_);
  expected.zero_();
  for (int r = 0; r < size_; ++r) expected.add_(filled({5}, at::kDouble, 20 + r));
  EXPECT_EQ(test::values(sum), test::values(expected));
  sum.mul(filled({5}, at::kDouble, 30)).sum().backward();
  EXPECT_EQ(test::values(part.grad()), test::values(filled({5}, at::kDouble, 30)));
}

// A tensor-parallel pair of matrices, loss = sum((x A)^2 B)^2 over rows, A cut by columns and B by rows, once with
// replicated rows (copy_to, reduce_from) and once with rows dealt to the ranks (gather_rows, reduce_scatter_rows):
// gradients against central differences of the undivided formula.
TEST_P(Collectives, TensorParallelPairMatchesFiniteDifferences) {
  const int64_t rows = 4, in = 3, hidden = 8, out = 2, own = hidden / size_;
  const at::Tensor x0 = test::filled({rows, in}, at::kDouble, 1), a0 = test::filled({in, hidden}, at::kDouble, 2),
                   b0 = test::filled({hidden, out}, at::kDouble, 3);
  auto whole_loss = [&](const at::Tensor& x, const at::Tensor& a, const at::Tensor& b) {
    return x.matmul(a).pow(2).matmul(b).pow(2).sum();
  };
  auto difference = [&](at::Tensor t, int64_t i, const std::function<at::Tensor()>& loss) {
    double* p = t.data_ptr<double>() + i;
    const double kept = *p, step = 1e-5;
    *p = kept + step;
    const double up = loss().item<double>();
    *p = kept - step;
    const double down = loss().item<double>();
    *p = kept;
    return (up - down) / (2 * step);
  };
  for (const bool dealt : {false, true}) {
    if (dealt && rows % size_ != 0) continue;
    const int64_t first = dealt ? rank_ * (rows / size_) : 0, count = dealt ? rows / size_ : rows;
    at::Tensor x = placed(x0.narrow(0, first, count)).requires_grad_(true);
    at::Tensor a = placed(a0.narrow(1, rank_ * own, own)).requires_grad_(true);
    at::Tensor b = placed(b0.narrow(0, rank_ * own, own)).requires_grad_(true);
    const at::Tensor inner = (dealt ? gather_rows(x, *group_) : copy_to(x, *group_)).matmul(a).pow(2).matmul(b);
    const at::Tensor y = dealt ? reduce_scatter_rows(inner, *group_) : reduce_from(inner, *group_);
    const at::Tensor loss = y.pow(2).sum();
    loss.backward();
    const double total = dealt ? everywhere(loss) : loss.item<double>();
    EXPECT_NEAR(total, whole_loss(x0, a0, b0).item<double>(), 1e-11 * total);
    for (int64_t i = 0; i < count * in; ++i) {
      const double expected = difference(x0, first * in + i, [&] { return whole_loss(x0, a0, b0); });
      EXPECT_NEAR(x.grad().view({-1})[i].item<double>(), expected, 1e-7 * (1 + std::abs(expected)));
    }
    for (int64_t i = 0; i < in; ++i)
      for (int64_t j = 0; j < own; ++j) {
        const double expected = difference(a0, i * hidden + rank_ * own + j, [&] { return whole_loss(x0, a0, b0); });
        EXPECT_NEAR(a.grad()[i][j].item<double>(), expected, 1e-7 * (1 + std::abs(expected)));
      }
    for (int64_t i = 0; i < own * out; ++i) {
      const double expected = difference(b0, rank_ * own * out + i, [&] { return whole_loss(x0, a0, b0); });
      EXPECT_NEAR(b.grad().view({-1})[i].item<double>(), expected, 1e-7 * (1 + std::abs(expected)));
    }
  }
}

TEST_P(Collectives, HalfPrecisionGradientsKeepTheirType) {
  at::Tensor x = filled({2, 3}, at::kBFloat16, rank_).requires_grad_(true);
  gather_rows(x, *group_).sum().backward();
  EXPECT_EQ(x.grad().scalar_type(), at::kBFloat16);
  for (double g : test::values(x.grad())) EXPECT_EQ(g, size_);
}

TEST_P(Collectives, ARankThatUsesNoRowStillTakesPart) {
  at::Tensor x = filled({2, 3}, at::kDouble, rank_).requires_grad_(true);
  const at::Tensor y = gather_rows(x, *group_);
  (rank_ == 0 ? y.narrow(0, 0, 0) : y).sum().backward();
  for (double g : test::values(x.grad())) EXPECT_EQ(g, size_ - 1);
}

TEST_P(Collectives, AloneNothingIsInserted) {
  const Mesh alone = Mesh::single();
  Communicator& group = alone.along(Axis::TENSOR);
  at::Tensor x = filled({4, 2}, at::kFloat, 0).requires_grad_(true);
  for (const at::Tensor& y : {gather_rows(x, group), reduce_scatter_rows(x, group), copy_to(x, group),
                              reduce_from(x, group), all_to_all_rows(x, {4}, {4}, group)})
    EXPECT_TRUE(y.is_same(x));
}

INSTANTIATE_TEST_SUITE_P(On, Collectives, testing::Values(test::On::HOST, test::On::GPU),
                         [](const testing::TestParamInfo<test::On>& info) { return test::label_of(info.param); });

}  // namespace
}  // namespace dsa
