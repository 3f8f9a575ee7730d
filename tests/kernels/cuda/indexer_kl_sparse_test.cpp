// The Hopper kernel of the indexer's loss over selected keys against plain loops in fp64.
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "kernels/indexer_kl/sparse_params.h"
#include "kernels/quantum.h"
#include "tests/kernels/cuda/indexer_backward_reference.h"
#include "tests/kernels/cuda/sparse_mla_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {

constexpr uint16_t kPoison = 0x7FC0;  // a bf16 NaN

struct Problem {
  int64_t queries, keys;
  int heads, k;
  std::vector<int32_t> indices, lengths;
  std::vector<float> p, weight;
  DeviceArray<uint16_t> q, key;
  DeviceArray<float> w, p_d, weight_d, scores;
  DeviceArray<int32_t> indices_d, lengths_d;

  Problem(int64_t t, int64_t s, int h, int k_, uint32_t seed, Lists kind = Lists::RANDOM)
      : queries(t), keys(s), heads(h), k(k_), weight(t), q(t * (h * 128 + 8)), key(s * 136), w(t * (h + 1)), p_d(t * k), weight_d(t),
        scores(t * (k + 4)),
        indices_d(t * k), lengths_d(t) {
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
    x.q = q.data(), x.q_stride = heads * 128 + 8, x.key = key.data(), x.k_stride = 136, x.w = w.data(), x.w_stride = heads + 1;
    x.indices = indices_d.data(), x.indices_stride = k, x.lengths = lengths_d.data(), x.p_sel = p_d.data(), x.p_stride = k;
    x.loss_scale = 0.25f, x.row_weight = weight_d.data();
    x.scores = scores.data(), x.scores_stride = k + 4;
    return x;
  }
};

struct Outputs {
  int64_t queries, rows, keys;
  DeviceArray<float> kl, target, prediction, dq, dw, dk;
  DeviceArray<uint16_t> dq_bf16, dk_bf16;
  DeviceArray<uint64_t> dk_sum;
  DeviceArray<QuantumReport> report;
  DeviceArray<char> workspace;

  explicit Outputs(const Problem& x)
      : queries(x.queries), rows(x.queries * x.heads), keys(x.keys), kl(queries), target(queries), prediction(queries), dq(rows * 128 + 64),
        dw(rows + 64), dk(keys * 128), dq_bf16(rows * 128 + 64), dk_bf16(keys * 128), dk_sum(indexer_kl_sparse_sum_bytes(keys) / 8 + 8),
        report(1), workspace(static_cast<int64_t>(indexer_kl_sparse_workspace_bytes())) {}
  QuantumReport run(IndexerKlSparseParams p, float quantum, bool bf16 = false) {
    for (const auto* a : {&kl, &target, &prediction, &dq, &dw, &dk}) a->fill_bytes(0xFF);
    dq_bf16.fill_bytes(0xFF), dk_bf16.fill_bytes(0xFF), workspace.fill_bytes(0xFF), report.fill_bytes(0xFF), dk_sum.fill_bytes(0xFF);
    cuda::check(cudaMemset(dk_sum.data(), 0, indexer_kl_sparse_sum_bytes(keys)), "clear the sums");
    p.kl = kl.data(), p.entropy_target = target.data(), p.entropy_prediction = prediction.data();
    p.dq = bf16 ? static_cast<void*>(dq_bf16.data()) : dq.data(), p.dq_bf16 = bf16, p.dw = dw.data(), p.dk_sum = dk_sum.data();
    p.quantum = quantum, p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
    launch_indexer_kl_sparse_sm90(p);
    launch_indexer_kl_sparse_finish_sm90(dk_sum.data(), keys, quantum, bf16 ? static_cast<void*>(dk_bf16.data()) : dk.data(), bf16,
                                         report.data(), nullptr);
    cuda::check(cudaDeviceSynchronize(), "run indexer_kl over selected keys");
    const auto sums = dk_sum.host();
    for (int64_t i = indexer_kl_sparse_sum_bytes(keys) / 8; i < dk_sum.size(); ++i) EXPECT_EQ(sums[i], ~uint64_t{0}) << "written past the end";
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

  static void expect_equal(Problem& x, const char* what) { expect_equal(x, x.params(), what); }
  static void expect_equal(Problem& x, const IndexerKlSparseParams& p, const char* what) {
    Outputs got(x);
    const float quantum = got.run_on_its_quantum(p);
    const int64_t rows = got.rows;
    const DeviceArray<double> dq(rows * 128), dw(rows), dk(x.keys * 128), sums(x.queries * 3), d(x.queries * x.k);
    reference_indexer_kl_sparse(p, {dq.data(), dw.data(), dk.data()}, sums.data(), d.data());
    const auto want = sums.host();
    const std::vector<float> have[3] = {got.kl.host(), got.target.host(), got.prediction.host()};
    for (int64_t t = 0; t < x.queries; ++t)
      for (int i = 0; i < 3; ++i)
        ASSERT_NEAR(have[i][t], want[3 * t + i], 1e-5 + 1e-3 * std::fabs(want[3 * t + i])) << what << " row " << t << " value " << i;
    const auto error = [](const DeviceArray<float>& a, const DeviceArray<double>& b, int64_t n) {
      double size = 0;
      for (const double v : b.host()) size += v * v;
      if (size > 0) return relative_error(a.data(), b.data(), n);
      const auto got = a.host();
      for (int64_t i = 0; i < n; ++i) EXPECT_EQ(got[i], 0);
      return 0.;
    };
    const double dq_error = error(got.dq, dq, rows * 128), dw_error = error(got.dw, dw, rows), dk_error = error(got.dk, dk, x.keys * 128);
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

TEST_F(IndexerKlSparse, MatchesPlainLoops) {
  for (const int64_t n : {1, 127, 128, 129}) {
    Problem x(n, n, 64, 64, n);
    expect_equal(x, ("causal, length " + std::to_string(n)).c_str());
  }
  struct Case {
    int64_t t, s;
    int h, k;
    Lists kind;
    const char* what;
  };
  for (const Case& c : {Case{20, 5000, 64, 2048, Lists::RANDOM, "64 heads, 2048 of 5000"}, Case{600, 4097, 64, 256, Lists::SHARED, "64 heads, shared, 600 rows"},
                        Case{50, 900, 8, 320, Lists::RANDOM, "8 heads, odd number of tiles"}, Case{5, 32769, 64, 4096, Lists::LOCAL, "4096 of 32769"},
                        Case{4097, 4097, 16, 128, Lists::LOCAL, "causal, length 4097, 16 heads"}, Case{9, 2000, 23, 512, Lists::SHARED, "23 heads"},
                        Case{700, 50000, 64, 1024, Lists::RANDOM, "dk larger than the cache"},
                        Case{2500, 131072, 8, 128, Lists::LOCAL, "the same, more rows"}}) {
    Problem x(c.t, c.s, c.h, c.k, 100 + c.h, c.kind);
    expect_equal(x, c.what);
  }
}

TEST_F(IndexerKlSparse, OddListsAndPoisonedNeighbours) {
  Problem x(40, 800, 64, 256, 17);
  std::mt19937 random(4);
  for (int t = 0; t < 40; ++t) {
    int32_t* row = &x.indices[t * 256];
    x.lengths[t] = t == 0 ? 0 : t == 1 ? 1 : t == 2 ? 64 : t == 3 ? 65 : 1 + random() % 256;
    for (int i = x.lengths[t]; i < 256; ++i) row[i] = t % 2 ? -1 : 2000000000;  // never read
    if (t == 5) for (int i = 0; i < x.lengths[t]; ++i) row[i] = -1;             // no key at all
    if (t == 6) row[x.lengths[t] - 1] = 800;                                    // just out of range
    if (t == 7) row[0] = -5;
    if (t == 8 && x.lengths[t] > 10) row[10] = row[9];                          // a key twice counts once
    for (int i = 0; i < x.lengths[t]; ++i) if (row[i] % 3 == 0) row[i] = -1;    // every third key is listed by nobody
  }
  x.draw_target(5);
  std::vector<uint16_t> key = x.key.host();
  for (int64_t s = 0; s < x.keys; s += 3) for (int c = 0; c < 128; ++c) key[s * 136 + c] = kPoison;
  cuda::check(cudaMemcpy(x.key.data(), key.data(), key.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
  expect_equal(x, "odd lists, poisoned neighbours");
}

TEST_F(IndexerKlSparse, OneKeyGivesNoLossAndNoGradient) {
  Problem x(6, 300, 64, 64, 23);
  for (int32_t& n : x.lengths) n = 1;
  for (int64_t t = 0; t < 6; ++t) x.p[t * 64] = 0.999f;  // a target that does not quite sum to 1
  Outputs got(x);
  got.run(x.params(), 0x1p-24f);
  for (const float v : got.kl.host()) EXPECT_EQ(v, 0);
  const auto dq = got.dq.host();
  for (int64_t i = 0; i < got.rows * 128; ++i) ASSERT_EQ(dq[i], 0);
  for (const float v : got.dk.host()) ASSERT_EQ(v, 0);
}

TEST_F(IndexerKlSparse, KeysSelectedByFp8Scores) {  // the loss is that of those scores, its gradient passes the quantiser straight through
  Problem x(20, 400, 8, 64, 41);
  const auto value = [](uint16_t b) { return std::bit_cast<float>(uint32_t{b} << 16); };
  const auto rounded = [](float v) {
    return static_cast<float>(__half(__nv_cvt_fp8_to_halfraw(__nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3), __NV_E4M3)));
  };
  const auto q = x.q.host(), key = x.key.host();
  const auto w = x.w.host();
  std::vector<float> scores(x.scores.size(), NAN);
  for (int64_t t = 0; t < 20; ++t) {
    const int seen = 381 + static_cast<int>(t);
    std::vector<std::pair<float, int>> best;
    for (int s = 0; s < seen; ++s) {
      float score = 0;
      for (int j = 0; j < 8; ++j) {
        float dot = 0;
        for (int c = 0; c < 128; ++c) dot += rounded(64 * value(q[t * 1032 + j * 128 + c])) * rounded(64 * value(key[s * 136 + c]));
        score += w[t * 9 + j] * std::max(0.f, dot) / 4096;
      }
      best.push_back({-score, s});
    }
    std::nth_element(best.begin(), best.begin() + 64, best.end());
    std::sort(best.begin(), best.begin() + 64, [](const auto& a, const auto& b) { return a.second < b.second; });
    for (int i = 0; i < 64; ++i) x.indices[t * 64 + i] = best[i].second, scores[t * 68 + i] = -best[i].first;
    x.lengths[t] = 64;
  }
  x.draw_target(6);
  const IndexerKlSparseParams p = x.params_of_any_scores();
  cuda::check(cudaMemcpy(x.scores.data(), scores.data(), scores.size() * 4, cudaMemcpyHostToDevice), "copy to the device");
  expect_equal(x, p, "selected by e4m3 scores");
}

TEST_F(IndexerKlSparse, LargeScores) {  // the softmax is nearly one-hot, p is far from it
  Problem x(30, 3000, 64, 512, 31);
  fill_normal_f32(x.w.data(), x.w.size(), 5, 0, 1);
  expect_equal(x, "scores of hundreds");
}

TEST_F(IndexerKlSparse, RepeatsBitForBit) {
  Problem x(600, 2000, 64, 512, 19, Lists::SHARED);
  const IndexerKlSparseParams p = x.params();
  Outputs got(x);
  const float quantum = got.run_on_its_quantum(p);
  const auto dk = got.dk_sum.host();
  const auto dq = got.dq.host(), dw = got.dw.host(), kl = got.kl.host();
  const auto same = [](const auto& a, const auto& b) { return !std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]); };
  for (int i = 0; i < 1000; ++i) {
    got.run(p, quantum);
    ASSERT_TRUE(same(got.dk_sum.host(), dk)) << "run " << i;
    if (i > 20 && i % 10) continue;
    ASSERT_TRUE(same(got.dq.host(), dq)) << "run " << i;
    ASSERT_TRUE(same(got.dw.host(), dw)) << "run " << i;
    ASSERT_TRUE(same(got.kl.host(), kl)) << "run " << i;
  }
  // Rows in another order add in another order: the same sums.
  std::vector<int32_t> order(600);
  for (int t = 0; t < 600; ++t) order[t] = (t * 7 + 3) % 600;
  IndexerKlSparseParams one = p;
  cuda::check(cudaMemset(got.dk_sum.data(), 0, indexer_kl_sparse_sum_bytes(x.keys)), "clear the sums");
  one.workspace = got.workspace.data(), one.workspace_bytes = got.workspace.size();
  one.queries = 1, one.quantum = quantum, one.dq = got.dq.data(), one.dq_bf16 = false, one.dw = got.dw.data(), one.dk_sum = got.dk_sum.data();
  for (const int t : order) {
    one.q = x.q.data() + t * p.q_stride, one.w = x.w.data() + t * p.w_stride, one.indices = p.indices + t * p.indices_stride;
    one.lengths = p.lengths + t, one.p_sel = p.p_sel + t * p.p_stride, one.row_weight = p.row_weight + t;
    one.scores = p.scores + t * p.scores_stride;
    launch_indexer_kl_sparse_sm90(one);
  }
  ASSERT_TRUE(same(got.dk_sum.host(), dk));
}

TEST_F(IndexerKlSparse, QuantumTooSmallIsNoticed) {
  Problem x(300, 2000, 64, 512, 43, Lists::SHARED);
  const IndexerKlSparseParams p = x.params();
  Outputs got(x);
  const float quantum = got.run_on_its_quantum(p);
  const QuantumReport fits = got.run(p, quantum);
  EXPECT_EQ(fits.difference, 0u);
  EXPECT_LE(fits.most, QuantumGuess::kMostQuanta);
  for (int i = 4; i <= 96; i += 4) {
    const QuantumReport r = got.run(p, std::ldexp(quantum, -i));
    EXPECT_TRUE(r.difference || r.most > QuantumGuess::kMostQuanta) << "2^-" << i << " of the quantum";
  }
  const float before = got.kl.host()[0];
  x.weight[3] = INFINITY;
  got.run(x.params(), quantum);
  EXPECT_EQ(got.kl.host()[0], before);
  EXPECT_FALSE(QuantumGuess().run([&](float q) { return got.run(p, q); }));
}

TEST_F(IndexerKlSparse, RefusesWithAReason) {
  Problem x(2, 100, 8, 64, 37);
  IndexerKlSparseParams p = x.params();
  const char* why = nullptr;
  p.quantum = 1;
  EXPECT_TRUE(sm90_supports(p, &why)) << why;
  p.k = 65;
  EXPECT_FALSE(sm90_supports(p, &why));
  p.k = 64, p.quantum = 3;
  EXPECT_THROW(launch_indexer_kl_sparse_sm90(p), std::runtime_error);
  p.quantum = 0;
  EXPECT_FALSE(sm90_supports(p, &why));
  p.quantum = 1, p.scores = nullptr;
  EXPECT_FALSE(sm90_supports(p, &why));
  p.scores = x.scores.data();
  EXPECT_THROW(launch_indexer_kl_sparse_sm90(p), std::runtime_error);  // no workspace
}

}  // namespace
}  // namespace dsa::test
