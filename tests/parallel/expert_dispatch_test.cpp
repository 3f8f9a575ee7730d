// Dispatch and combine against plain loops over all tokens of all ranks, on the host and on GPUs. The expert is y = tanh(a_e * x), element by
// element, whose gradients are written out below.
#include "parallel/expert_dispatch.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>
#include <stdexcept>
#include <tuple>

#include "parallel/mesh.h"
#include "tests/parallel/devices.h"
#include "tests/parallel/tensors.h"
#include "tests/parallel/watched.h"

namespace dsa {
namespace {

using test::filled;
using test::Watched;

int world_size() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

struct Case {
  const char* name;
  std::vector<int64_t> tokens;  // per rank of the group, repeated when it is larger
  int64_t experts, choices;
  int64_t popular;  // tokens choose among experts [0, popular) only
};

const std::vector<Case> kCases = {
    {"usual", {5, 7, 3, 6}, 8, 3, 8},
    {"rank without tokens", {0, 4, 5, 0}, 8, 2, 8},
    {"last rank without tokens", {6, 0, 3, 0}, 4, 1, 4},
    {"experts and ranks without rows", {5, 6, 4, 3}, 8, 2, 2},
    {"every expert of every token", {3, 2, 4, 1}, 4, 4, 4},
    {"no token at all", {0, 0, 0, 0}, 4, 2, 4},
};

// Thousands of rows on some ranks, a handful on another.
const Case kLong = {"long", {9000, 5, 8500, 7000}, 8, 2, 8};

constexpr int64_t H = 5;

/// What one rank of the group feeds in; the same on whichever rank it is computed.
struct Input {
  at::Tensor experts_NK, weights_NK, x_NH, out_gradient_NH;
};

Input input_of(const Case& c, int rank, at::ScalarType dtype) {
  const int64_t N = c.tokens[rank % c.tokens.size()];
  at::Tensor experts = at::empty({N, c.choices}, at::TensorOptions(at::kLong));
  for (int64_t n = 0; n < N; ++n) {  // the `choices` popular experts with the largest noise, in that order
    std::vector<int64_t> order(c.popular);
    for (int64_t e = 0; e < c.popular; ++e) order[e] = e;
    auto score = [&](int64_t e) { return test::noise(1000 + rank, n * c.experts + e); };
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return score(a) > score(b); });
    for (int64_t k = 0; k < c.choices; ++k) experts.data_ptr<int64_t>()[n * c.choices + k] = order[k];
  }
  const auto weight_type = dtype == at::kDouble ? at::kDouble : at::kFloat;
  return {experts, filled({N, c.choices}, weight_type, 10 + rank), filled({N, H}, dtype, 20 + rank),
          filled({N, H}, dtype, 30 + rank)};
}

class Dispatch : public testing::TestWithParam<std::tuple<int, test::On>> {  // expert degree
 protected:
  void SetUp() override {
    const auto [degree, on] = GetParam();
    const auto where = test::device_for(on);
    if (!where) GTEST_SKIP() << test::kNoGpus;
    device_ = *where;
    mesh_ = std::make_unique<Mesh>(Degrees{.data = world_size(), .expert = degree}, /*check_calls=*/true, device_);
    group_ = &mesh_->along(Axis::EXPERT);
  }
  /// input_of where this mesh computes.
  Input own_input(const Case& c, at::ScalarType dtype) const {
    const Input in = input_of(c, group_->rank(), dtype);
    return {in.experts_NK.to(device_), in.weights_NK.to(device_), in.x_NH.to(device_), in.out_gradient_NH.to(device_)};
  }
  at::Device device_ = at::kCPU;
  std::unique_ptr<Mesh> mesh_;
  Communicator* group_ = nullptr;
};

/// Runs each local expert on its rows. Without rows nothing is run and the result has no graph.
at::Tensor run_experts(const at::Tensor& rows_MH, const std::vector<int64_t>& counts, const at::Tensor& a_EH) {
  std::vector<at::Tensor> parts;
  int64_t row = 0;
  for (size_t e = 0; e < counts.size(); row += counts[e++])
    if (counts[e] > 0) parts.push_back(rows_MH.narrow(0, row, counts[e]).mul(a_EH[e]).tanh());
  return parts.empty() ? at::zeros({0, H}, rows_MH.options()) : at::cat(parts);
}

TEST_P(Dispatch, RowsStandByExpertThenSourceThenToken) {
  for (const Case& c : kCases) {
    const Input mine = own_input(c, at::kDouble);
    ExpertDispatch dispatch(mine.experts_NK, mine.weights_NK, c.experts, *group_);
    const std::vector<double> rows = test::values(dispatch.dispatch(mine.x_NH));
    const int64_t per_rank = c.experts / group_->size();
    std::vector<double> expected;
    for (int64_t e = 0; e < per_rank; ++e) {
      int64_t count = 0;
      for (int r = 0; r < group_->size(); ++r) {
        const Input in = input_of(c, r, at::kDouble);
        for (int64_t n = 0; n < in.x_NH.size(0); ++n)
          for (int64_t k = 0; k < c.choices; ++k)
            if (in.experts_NK[n][k].item<int64_t>() == group_->rank() * per_rank + e) {
              const std::vector<double> x = test::values(in.x_NH[n]);
              expected.insert(expected.end(), x.begin(), x.end());
              ++count;
            }
      }
      EXPECT_EQ(dispatch.rows_per_expert()[e], count) << c.name;
    }
    EXPECT_EQ(rows, expected) << c.name;
  }
}

TEST_P(Dispatch, ValuesAndGradientsMatchPlainLoops) {
  std::vector<Case> cases = kCases;
  cases.push_back(kLong);
  for (const Case& c : cases) {
    const int ranks = group_->size(), rank = group_->rank();
    const int64_t per_rank = c.experts / ranks, K = c.choices;
    const at::Tensor all_a = filled({c.experts, H}, at::kDouble, 5);
    Input mine = own_input(c, at::kDouble);
    at::Tensor a = all_a.narrow(0, rank * per_rank, per_rank).to(device_, at::kDouble, false, /*copy=*/true).requires_grad_(true);
    at::Tensor x = mine.x_NH.requires_grad_(true), w = mine.weights_NK.requires_grad_(true);
    ExpertDispatch dispatch(mine.experts_NK, w, c.experts, *group_);
    const at::Tensor rows = dispatch.dispatch(x);
    const at::Tensor out = dispatch.combine(run_experts(rows, dispatch.rows_per_expert(), a));
    out.mul(mine.out_gradient_NH).sum().backward();

    const at::TensorOptions host(at::kDouble);
    at::Tensor e_out = at::zeros(x.sizes(), host), e_dx = e_out.clone(), e_dw = at::zeros(w.sizes(), host),
               e_da = at::zeros(a.sizes(), host);
    const double* pa = all_a.data_ptr<double>();
    for (int r = 0; r < ranks; ++r) {
      const Input in = input_of(c, r, at::kDouble);
      for (int64_t n = 0; n < in.x_NH.size(0); ++n)
        for (int64_t k = 0; k < K; ++k) {
          const int64_t e = in.experts_NK.data_ptr<int64_t>()[n * K + k], local = e - rank * per_rank;
          const double weight = in.weights_NK.data_ptr<double>()[n * K + k];
          for (int64_t h = 0; h < H; ++h) {
            const double xi = in.x_NH.data_ptr<double>()[n * H + h], ai = pa[e * H + h], t = std::tanh(ai * xi);
            const double g = in.out_gradient_NH.data_ptr<double>()[n * H + h];
            if (r == rank) {
              e_out.data_ptr<double>()[n * H + h] += weight * t;
              e_dx.data_ptr<double>()[n * H + h] += g * weight * (1 - t * t) * ai;
              e_dw.data_ptr<double>()[n * K + k] += g * t;
            }
            if (local >= 0 && local < per_rank)
              e_da.data_ptr<double>()[local * H + h] += g * weight * (1 - t * t) * xi;
          }
        }
    }
    auto near = [&](const at::Tensor& got, const at::Tensor& expected, const char* what) {
      if (!got.defined()) {  // an expert parameter whose rank had no rows
        for (double v : test::values(expected)) EXPECT_EQ(v, 0.0) << what << ", " << c.name;
        return;
      }
      const std::vector<double> g = test::values(got), e = test::values(expected);
      ASSERT_EQ(g.size(), e.size());
      for (size_t i = 0; i < g.size(); ++i) EXPECT_NEAR(g[i], e[i], 1e-12 * (1 + std::abs(e[i]))) << what << ", " << c.name;
    };
    near(out, e_out, "out");
    near(x.grad(), e_dx, "dx");
    near(w.grad(), e_dw, "dweights");
    near(a.grad(), e_da, "da");
    EXPECT_TRUE(x.grad().defined() && w.grad().defined());
  }
}

TEST_P(Dispatch, HalfPrecisionAddsInFp32PerRankThenOverRanks) {
  const Case& c = kCases[0];
  const int64_t per_rank = c.experts / group_->size(), K = c.choices;
  const Input mine = own_input(c, at::kBFloat16);
  const at::Tensor scale = filled({c.experts}, at::kBFloat16, 6).to(device_);
  ExpertDispatch dispatch(mine.experts_NK, mine.weights_NK, c.experts, *group_);
  const at::Tensor rows = dispatch.dispatch(mine.x_NH);
  std::vector<at::Tensor> parts;  // expert e: y = scale_e * x, rounded to bf16
  for (int64_t e = 0, row = 0; e < per_rank; row += dispatch.rows_per_expert()[e++])
    parts.push_back(rows.narrow(0, row, dispatch.rows_per_expert()[e]).mul(scale[group_->rank() * per_rank + e]));
  const at::Tensor out = dispatch.combine(at::cat(parts));
  ASSERT_EQ(out.scalar_type(), at::kBFloat16);
  for (int64_t n = 0; n < out.size(0); ++n)
    for (int64_t h = 0; h < H; ++h) {
      float sum = 0;
      for (int rank = 0; rank < group_->size(); ++rank) {
        float partial = 0;
        for (int64_t e = rank * per_rank; e < (rank + 1) * per_rank; ++e)
          for (int64_t k = 0; k < K; ++k)
            if (mine.experts_NK[n][k].item<int64_t>() == e) {
              const at::BFloat16 y = at::BFloat16(mine.x_NH[n][h].item<float>() * scale[e].item<float>());
              partial += mine.weights_NK[n][k].item<float>() * static_cast<float>(y);
            }
        sum += static_cast<float>(at::BFloat16(partial));
      }
      EXPECT_EQ(out[n][h].item<float>(), static_cast<float>(at::BFloat16(sum)));
    }
}

TEST_P(Dispatch, OneTokenTravelsOncePerRank) {
  if (group_->size() == 1) return;  // nothing travels
  for (const Case& c : kCases) {
    const int64_t per_rank = c.experts / group_->size();
    int64_t sent = 0, received = 0;  // distinct (token, rank) pairs from here and to here
    for (int r = 0; r < group_->size(); ++r) {
      const Input in = input_of(c, r, at::kDouble);
      for (int64_t n = 0; n < in.x_NH.size(0); ++n) {
        std::set<int64_t> ranks;
        for (int64_t k = 0; k < c.choices; ++k) ranks.insert(in.experts_NK[n][k].item<int64_t>() / per_rank);
        if (r == group_->rank()) sent += static_cast<int64_t>(ranks.size());
        received += static_cast<int64_t>(ranks.count(group_->rank()));
      }
    }
    Watched watched(*group_);
    Input mine = own_input(c, at::kDouble);
    at::Tensor x = mine.x_NH.requires_grad_(true);
    ExpertDispatch dispatch(mine.experts_NK, mine.weights_NK, c.experts, watched);
    dispatch.combine(dispatch.dispatch(x)).sum().backward();
    // there and back, and the same for the gradients
    EXPECT_EQ(watched.wide_rows, (std::vector<int64_t>{sent, received, sent, received})) << c.name;
  }
}

TEST_P(Dispatch, WhatRunsMeanwhileRunsBetweenDepartureAndArrival) {
  if (group_->size() == 1) return;  // nothing travels
  Watched watched(*group_);
  const auto note = [&](const char* what) {
    return [&watched, what](const at::Tensor& gradient) {
      watched.log.push_back(what);
      return gradient;
    };
  };
  Input mine = own_input(kCases[0], at::kDouble);
  at::Tensor x = mine.x_NH.requires_grad_(true), a, b;
  ExpertDispatch dispatch(mine.experts_NK, mine.weights_NK, kCases[0].experts, watched);
  const at::Tensor rows = dispatch.dispatch(x, [&] {
    a = x.mul(3);
    a.register_hook(note("gradient of a"));
    watched.log.push_back("a");
  });
  const at::Tensor y = rows.mul(2);
  y.register_hook(note("gradient of the experts"));
  const at::Tensor out = dispatch.combine(y, [&] {
    b = a.tanh();
    b.register_hook(note("gradient of b"));
    watched.log.push_back("b");
  });
  out.add(b).sum().backward();
  EXPECT_EQ(watched.log, (std::vector<std::string>{"rows leave", "a", "rows leave", "b", "rows leave", "gradient of b",
                                                   "gradient of the experts", "rows leave", "gradient of a"}));
  // The same without anything in between.
  at::Tensor x2 = x.detach().clone().requires_grad_(true);
  ExpertDispatch plain(mine.experts_NK, mine.weights_NK, kCases[0].experts, *group_);
  const at::Tensor out2 = plain.combine(plain.dispatch(x2).mul(2));
  out2.add(x2.mul(3).tanh()).sum().backward();
  EXPECT_TRUE(at::equal(out, out2));
  EXPECT_TRUE(at::equal(x.grad(), x2.grad()));
}

TEST_P(Dispatch, FrozenInputsKeepTheRanksTogether) {
  // Only the experts' parameters learn; a rank without rows has no graph of its own, yet backward must not hang.
  const Case& c = kCases[3];
  Input mine = own_input(c, at::kDouble);
  const int64_t per_rank = c.experts / group_->size();
  at::Tensor a = filled({per_rank, H}, at::kDouble, 5).to(device_).requires_grad_(true);
  ExpertDispatch dispatch(mine.experts_NK, mine.weights_NK, c.experts, *group_);
  const at::Tensor rows = dispatch.dispatch(mine.x_NH);
  const at::Tensor out = dispatch.combine(run_experts(rows, dispatch.rows_per_expert(), a));
  EXPECT_TRUE(out.requires_grad());
  out.sum().backward();
  EXPECT_EQ(a.grad().defined(), rows.size(0) > 0);
}

TEST_P(Dispatch, WithoutGradModeThereIsNoGraph) {
  at::NoGradGuard no_grad;
  const Input mine = own_input(kCases[0], at::kFloat);
  ExpertDispatch dispatch(mine.experts_NK, mine.weights_NK, kCases[0].experts, *group_);
  EXPECT_FALSE(dispatch.combine(dispatch.dispatch(mine.x_NH)).requires_grad());
}

TEST_P(Dispatch, BadRoutingIsRefused) {
  const Input mine = input_of(kCases[0], 0, at::kFloat);
  auto make = [&](const at::Tensor& experts, const at::Tensor& weights, int64_t n) {
    ExpertDispatch dispatch(experts, weights, n, *group_);
  };
  at::Tensor twice = mine.experts_NK.clone(), outside = mine.experts_NK.clone();
  twice[1][0] = twice[1][1];
  outside[0][0] = 8;
  EXPECT_THROW(make(twice, mine.weights_NK, 8), std::invalid_argument);
  EXPECT_THROW(make(outside, mine.weights_NK, 8), std::invalid_argument);
  EXPECT_THROW(make(mine.experts_NK.to(at::kInt), mine.weights_NK, 8), std::invalid_argument);
  EXPECT_THROW(make(mine.experts_NK, mine.weights_NK.narrow(1, 0, 1), 8), std::invalid_argument);
  if (group_->size() > 1) {
    EXPECT_THROW(make(mine.experts_NK, mine.weights_NK, 9), std::invalid_argument);
  }
  ExpertDispatch dispatch(mine.experts_NK, mine.weights_NK, 8, *group_);
  EXPECT_THROW(dispatch.combine(mine.x_NH), std::logic_error);
  EXPECT_THROW(dispatch.dispatch(mine.x_NH.narrow(0, 0, 1)), std::invalid_argument);
  dispatch.dispatch(mine.x_NH);
  EXPECT_THROW(dispatch.dispatch(mine.x_NH), std::logic_error);
}

std::vector<int> legal_degrees() {  // asked after MPI_Init
  std::vector<int> degrees;
  for (int e : {1, 2, 4})
    if (world_size() % e == 0) degrees.push_back(e);
  return degrees;
}

INSTANTIATE_TEST_SUITE_P(ExpertDegree, Dispatch,
                         testing::Combine(testing::ValuesIn(legal_degrees()), testing::Values(test::On::HOST, test::On::GPU)),
                         [](const testing::TestParamInfo<std::tuple<int, test::On>>& info) {
                           return std::to_string(std::get<0>(info.param)) + test::label_of(std::get<1>(info.param));
                         });

}  // namespace
}  // namespace dsa
