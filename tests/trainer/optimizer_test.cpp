// AdamW with clip groups against a plain loop, the learning-rate schedule against its formula, the router's bias rule.
// Run on 1, 2 and 4 ranks: each rank contributes a part of the gradient, the sums are those of the loop.
#include <ATen/ops/full.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <cmath>

#include "tests/support/tensors.h"
#include "trainer/lr_schedule.h"
#include "trainer/optimizer.h"
#include "trainer/router_bias.h"

namespace dsa {
namespace {

Mesh data_mesh() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return Mesh(Degrees{size, 1, 1, 1});
}

struct Plain {  // one parameter of the loop
  std::vector<double> w, m, v;
  bool decay, indexer;
};

std::vector<double> values(const at::Tensor& t) {
  const at::Tensor flat = t.detach().to(at::kDouble).contiguous();
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}

TEST(Optimizer, IsAdamWWithTwoClipGroups) {
  Mesh mesh = data_mesh();
  const int ranks = mesh.world_size();
  // Row counts that no rank count divides, a vector, and an indexer matrix.
  ParameterList list;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape, ParameterGroup group, bool decay, uint64_t seed) {
    at::Tensor value = random_tensor(shape, seed).set_requires_grad(true);
    list.parameters.push_back({value, {whole(name, shape)}, group, decay, false});
  };
  add("a.weight", {7, 3}, ParameterGroup::BACKBONE, true, 1);
  add("a_norm.weight", {5}, ParameterGroup::BACKBONE, false, 2);
  add("indexer.weight", {3, 4}, ParameterGroup::INDEXER, true, 3);
  const AdamOptions options{0.9, 0.95, 1e-8, 0.1, false, 0.5};
  std::vector<Plain> plain;
  for (const Parameter& p : list.parameters) {
    const std::vector<double> w = values(p.value);
    plain.push_back({w, std::vector<double>(w.size()), std::vector<double>(w.size()), p.decay, p.group == ParameterGroup::INDEXER});
  }
  ShardedAdamW optimizer(list, mesh, options);
  // The master weights are zero until told: give them the values, as a checkpoint would.
  const OptimizerState state = optimizer.state();  // on a CPU its memory is the optimizer's own
  for (const StateShard& s : state.shards) {
    if (s.role != Role::PARAM) continue;
    for (const Parameter& p : list.parameters)
      if (p.shards[0].name == s.box.name) {
        const std::vector<double> w = values(p.value);
        const int64_t row = s.box.extent.size() > 1 ? s.box.extent[1] : 1;
        std::copy_n(w.begin() + s.box.offset[0] * row, numel(s.box), static_cast<double*>(s.data));
      }
  }
  for (int step = 1; step <= 4; ++step) {
    std::vector<std::vector<double>> gradient;
    for (size_t i = 0; i < plain.size(); ++i) {
      const at::Tensor whole_gradient = random_tensor(list.parameters[i].value.sizes(), 100 * step + i);
      gradient.push_back(values(whole_gradient));
      // Two microbatches; each rank holds its share of both.
      for (const double part : {0.25, 0.75}) {
        list.parameters[i].value.mutable_grad() = whole_gradient * (part / ranks);
        optimizer.accumulate();
      }
    }
    double square[2] = {0, 0};
    for (size_t i = 0; i < plain.size(); ++i)
      for (const double g : gradient[i]) square[plain[i].indexer] += g * g;
    const GradientNorms norms = optimizer.reduce();
    EXPECT_NEAR(norms.backbone, std::sqrt(square[0]), 1e-12 * norms.backbone);
    EXPECT_NEAR(norms.indexer, std::sqrt(square[1]), 1e-12 * norms.indexer);
    optimizer.step(norms, 1e-2, 3e-2);
    for (size_t i = 0; i < plain.size(); ++i) {
      Plain& p = plain[i];
      const double clip = std::min(1.0, options.clip / std::sqrt(square[p.indexer])), lr = p.indexer ? 3e-2 : 1e-2;
      for (size_t j = 0; j < p.w.size(); ++j) {
        const double g = gradient[i][j] * clip;
        p.m[j] = 0.9 * p.m[j] + 0.1 * g;
        p.v[j] = 0.95 * p.v[j] + 0.05 * g * g;
        const double m = p.m[j] / (1 - std::pow(0.9, step)), v = p.v[j] / (1 - std::pow(0.95, step));
        p.w[j] -= lr * (m / (std::sqrt(v) + options.eps) + (p.decay ? options.weight_decay * p.w[j] : 0));
      }
      const std::vector<double> w = values(list.parameters[i].value);
      for (size_t j = 0; j < w.size(); ++j) EXPECT_NEAR(w[j], p.w[j], 1e-12) << i << "," << j << " step " << step;
    }
  }
}

TEST(Optimizer, OneNanIsSeenByAll) {
  Mesh mesh = data_mesh();
  ParameterList list;
  list.parameters.push_back({at::full({6}, 1.0, at::kDouble).set_requires_grad(true), {whole("w", {6})}, ParameterGroup::BACKBONE, true, false});
  ShardedAdamW optimizer(list, mesh, {});
  at::Tensor gradient = at::full({6}, 1.0, at::kDouble);
  if (mesh.rank() == mesh.world_size() - 1) gradient[5] = std::nan("");
  list.parameters[0].value.mutable_grad() = gradient;
  optimizer.accumulate();
  EXPECT_FALSE(optimizer.reduce().finite());
  list.parameters[0].value.mutable_grad() = at::full({6}, 1.0, at::kDouble);
  optimizer.accumulate();
  EXPECT_TRUE(optimizer.reduce().finite()) << "the sums start afresh";
}

TEST(LrSchedule, WarmsUpAndDecays) {
  Recipe::Schedule s;
  s.steps = 110;
  s.warmup_steps = 10;
  s.final_lr = 2e-4;
  EXPECT_DOUBLE_EQ(lr_factor(s, 1e-3, 1), 0.1);
  EXPECT_DOUBLE_EQ(lr_factor(s, 1e-3, 10), 1);
  EXPECT_DOUBLE_EQ(lr_factor(s, 1e-3, 110), 1);
  s.decay = Decay::LINEAR;
  EXPECT_DOUBLE_EQ(lr_factor(s, 1e-3, 60), 0.6);
  EXPECT_DOUBLE_EQ(lr_factor(s, 1e-3, 110), 0.2);
  s.decay = Decay::COSINE;
  EXPECT_NEAR(lr_factor(s, 1e-3, 60), 0.6, 1e-12);
  EXPECT_NEAR(lr_factor(s, 1e-3, 35), 0.2 + 0.8 * 0.5 * (1 + std::sqrt(0.5)), 1e-12);
  EXPECT_NEAR(lr_factor(s, 1e-3, 110), 0.2, 1e-12);
}

TEST(RouterBias, MovesAgainstTheGlobalLoad) {
  Mesh mesh = data_mesh();
  ParameterList list;
  list.buffers.push_back({"bias", at::full({4}, 0.5, at::kDouble)});
  ModelReport report;
  report.layers.resize(2);  // a dense layer, then a MoE layer
  at::Tensor load = at::full({4}, 10, at::kLong);
  // Rank 0 alone sees expert 0 overloaded and expert 3 idle; the mean over all ranks decides.
  if (mesh.rank() == 0) {
    load[0] = 30;
    load[3] = 0;
    load[1] = 12;
    load[2] = 10;
  }
  report.layers[1].expert_rows_E = load;
  update_router_bias(list, report, 0.01, mesh);
  const double ranks = mesh.world_size(), mean = 10 + 3 / ranks;
  const double loads[4] = {10 + 20 / ranks, 10 + 2 / ranks, 10, 10 - 10 / ranks};
  for (int e = 0; e < 4; ++e)
    EXPECT_DOUBLE_EQ(list.buffers[0].value[e].item<double>(), 0.5 + (mean > loads[e] ? 0.01 : mean < loads[e] ? -0.01 : 0)) << e;
  EXPECT_DOUBLE_EQ(*expert_load_max_over_mean(report, mesh), loads[0] / mean);
}

}  // namespace
}  // namespace dsa
