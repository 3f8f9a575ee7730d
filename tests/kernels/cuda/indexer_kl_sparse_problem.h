// Problems of the indexer's loss over selected keys, the Hopper kernel's outputs, and their comparison with plain loops
// in fp64.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/indexer_kl/sparse_params.h"
#include "kernels/quantum.h"
#include "tests/kernels/cuda/indexer_backward_reference.h"
#include "tests/kernels/cuda/sparse_mla_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {

struct SelectedProblem {
  int64_t queries, keys;
  int heads, k;
  std::vector<int32_t> indices, lengths;
  std::vector<float> p, weight;
  DeviceArray<uint16_t> q, key;
  DeviceArray<float> w, p_d, weight_d, scores;
  DeviceArray<int32_t> indices_d, lengths_d;

  SelectedProblem(int64_t t, int64_t s, int h, int k_, uint32_t seed, Lists kind = Lists::RANDOM)
      : queries(t),
        keys(s),
        heads(h),
        k(k_),
        weight(t),
        q(t * (h * 128 + 8)),
        key(s * 136),
        w(t * (h + 1)),
        p_d(t * k),
        weight_d(t),
        scores(t * (k + 4)),
        indices_d(t * k),
        lengths_d(t) {
    fill_normal_bf16(q.data(), q.size(), seed, 1);
    fill_normal_bf16(key.data(), key.size(), seed + 1, 1);
    fill_normal_f32(w.data(), w.size(), seed + 2, 0, 0.02f);
    make_lists(kind, t, s, k, seed + 3, indices, lengths);
    std::mt19937 random(seed);
    for (float& x : weight) x = random() % 4 ? 0.5f + random() % 100 * 0.01f : 0.f;
    draw_target(seed + 4);
  }
  bool counts(int64_t t, int i) const {
    const int32_t* row = &indices[t * k];
    return i < lengths[t] && row[i] >= 0 && row[i] < keys && (i == 0 || row[i] > row[i - 1]);
  }
  // Uneven, some of it zero; poison where an entry does not count.
  void draw_target(uint32_t seed) {
    std::mt19937 random(seed);
    p.assign(queries * k, NAN);
    for (int64_t t = 0; t < queries; ++t) {
      double sum = 0;
      for (int i = 0; i < k; ++i)
        if (counts(t, i)) sum += p[t * k + i] = random() % 5 ? std::exp(-4.f * (random() % 1000) * 1e-3f) : 0.f;
      for (int i = 0; i < k; ++i)
        if (counts(t, i)) p[t * k + i] = sum > 0 ? p[t * k + i] / sum : i == 0;
    }
  }
  /// With the scores of q, k and w.
  IndexerKlSparseParams params() {
    const IndexerKlSparseParams x = params_of_any_scores();
    reference_indexer_scores(x, scores.data());
    return x;
  }
  IndexerKlSparseParams params_of_any_scores() {
    const auto copy = [](const auto& to, const auto& from) {
      cuda::check(cudaMemcpy(to.data(), from.data(), from.size() * 4, cudaMemcpyHostToDevice), "copy to the device");
    };
    copy(indices_d, indices), copy(lengths_d, lengths), copy(p_d, p), copy(weight_d, weight);
    IndexerKlSparseParams x;
    x.queries = queries, x.keys = keys, x.heads = heads, x.k = k;
    x.q = q.data(), x.q_stride = heads * 128 + 8, x.key = key.data(), x.k_stride = 136, x.w = w.data(),
    x.w_stride = heads + 1;
    x.indices = indices_d.data(), x.indices_stride = k, x.lengths = lengths_d.data(), x.p_sel = p_d.data(),
    x.p_stride = k;
    x.loss_scale = 0.25f, x.row_weight = weight_d.data();
    x.scores = scores.data(), x.scores_stride = k + 4;
    return x;
  }
};

struct SelectedOutputs {
  int64_t queries, rows, keys;
  DeviceArray<float> kl, target, prediction, dq, dw, dk;
  DeviceArray<uint16_t> dq_bf16, dk_bf16;
  DeviceArray<uint64_t> dk_sum;
  DeviceArray<QuantumReport> report;
  DeviceArray<char> workspace;

  explicit SelectedOutputs(const SelectedProblem& x)
      : queries(x.queries),
        rows(x.queries * x.heads),
        keys(x.keys),
        kl(queries),
        target(queries),
        prediction(queries),
        dq(rows * 128 + 64),
        dw(rows + 64),
        dk(keys * 128),
        dq_bf16(rows * 128 + 64),
        dk_bf16(keys * 128),
        dk_sum(indexer_kl_sparse_sum_bytes(keys) / 8 + 8),
        report(1),
        workspace(static_cast<int64_t>(indexer_kl_sparse_workspace_bytes()) + 64) {}
  QuantumReport run(IndexerKlSparseParams p, float quantum, bool bf16 = false) {
    for (const auto* a : {&kl, &target, &prediction, &dq, &dw, &dk}) a->fill_bytes(0xFF);
    dq_bf16.fill_bytes(0xFF), dk_bf16.fill_bytes(0xFF), workspace.fill_bytes(0xFF), report.fill_bytes(0xFF),
        dk_sum.fill_bytes(0xFF);
    cuda::check(cudaMemset(dk_sum.data(), 0, indexer_kl_sparse_sum_bytes(keys)), "clear the sums");
    p.kl = kl.data(), p.entropy_target = target.data(), p.entropy_prediction = prediction.data();
    p.dq = bf16 ? static_cast<void*>(dq_bf16.data()) : dq.data(), p.dq_bf16 = bf16, p.dw = dw.data(),
    p.dk_sum = dk_sum.data();
    p.quantum = quantum, p.workspace = workspace.data(), p.workspace_bytes = indexer_kl_sparse_workspace_bytes();
    launch_indexer_kl_sparse_sm90(p);
    launch_indexer_kl_sparse_finish_sm90(dk_sum.data(), keys, quantum,
                                         bf16 ? static_cast<void*>(dk_bf16.data()) : dk.data(), bf16, report.data(),
                                         nullptr);
    cuda::check(cudaDeviceSynchronize(), "run indexer_kl over selected keys");
    const auto sums = dk_sum.host();
    for (int64_t i = indexer_kl_sparse_sum_bytes(keys) / 8; i < dk_sum.size(); ++i)
      EXPECT_EQ(sums[i], ~uint64_t{0}) << "written past the end";
    const auto counters = workspace.host();
    for (int64_t i = workspace.size() - 64; i < workspace.size(); ++i)
      EXPECT_EQ(counters[i], '\xFF') << "written past the end";
    return report.host()[0];
  }
  float run_on_its_quantum(const IndexerKlSparseParams& p) {
    float quantum = 0;
    EXPECT_TRUE(QuantumGuess().run([&](float q) { return run(p, quantum = q); }));
    return quantum;
  }
};

class IndexerKlSparse : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) {
      std::puts("no CUDA device");
      GTEST_SKIP();
    }
  }

  static void expect_equal(SelectedProblem& x, const char* what) { expect_equal(x, x.params(), what); }
  static void expect_equal(SelectedProblem& x, const IndexerKlSparseParams& p, const char* what) {
    SelectedOutputs got(x);
    const float quantum = got.run_on_its_quantum(p);
    const int64_t rows = got.rows;
    const DeviceArray<double> dq(rows * 128), dw(rows), dk(x.keys * 128), sums(x.queries * 3), d(x.queries * x.k);
    reference_indexer_kl_sparse(p, {dq.data(), dw.data(), dk.data()}, sums.data(), d.data());
    const auto want = sums.host();
    const std::vector<float> have[3] = {got.kl.host(), got.target.host(), got.prediction.host()};
    for (int64_t t = 0; t < x.queries; ++t)
      for (int i = 0; i < 3; ++i)
        ASSERT_NEAR(have[i][t], want[3 * t + i], 1e-5 + 1e-3 * std::fabs(want[3 * t + i]))
            << what << " row " << t << " value " << i;
    const auto error = [](const DeviceArray<float>& a, const DeviceArray<double>& b, int64_t n) {
      double size = 0;
      for (const double v : b.host()) size += v * v;
      if (size > 0) return relative_error(a.data(), b.data(), n);
      const auto got = a.host();
      for (int64_t i = 0; i < n; ++i) EXPECT_EQ(got[i], 0);
      return 0.;
    };
    const double dq_error = error(got.dq, dq, rows * 128), dw_error = error(got.dw, dw, rows),
                 dk_error = error(got.dk, dk, x.keys * 128);
    std::printf("%-44s dq %.1e dw %.1e dk %.1e\n", what, dq_error, dw_error, dk_error);
    EXPECT_LT(dq_error, 1e-4) << what;
    EXPECT_LT(dw_error, 1e-4) << what;
    EXPECT_LT(dk_error, 2e-3) << what;
    const auto end_dq = got.dq.host(), end_dw = got.dw.host();
    for (int i = 0; i < 64; ++i) {
      EXPECT_TRUE(std::isnan(end_dq[rows * 128 + i])) << what << ": written past the end";
      EXPECT_TRUE(std::isnan(end_dw[rows + i])) << what << ": written past the end";
    }
    got.run(p, quantum, true);
    if (dq_error > 0) {
      EXPECT_LT(relative_error_bf16(got.dq_bf16.data(), dq.data(), rows * 128), 3e-3) << what;
    }
    if (dk_error > 0) {
      EXPECT_LT(relative_error_bf16(got.dk_bf16.data(), dk.data(), x.keys * 128), 3e-3) << what;
    }
  }
};

}  // namespace dsa::test
