// The Hopper kernel of the indexer's loss over selected keys against plain loops in fp64.
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "tests/kernels/cuda/indexer_kl_sparse_problem.h"

namespace dsa::test {
namespace {

TEST_F(IndexerKlSparse, Lengths) {
  for (const int64_t n : {1, 127, 128, 129}) {
    SelectedProblem x(n, n, 64, 64, n);
    expect_equal(x, ("causal, length " + std::to_string(n)).c_str());
  }
}

struct Case {
  int64_t t, s;
  int h, k;
  Lists kind;
  const char* what;
};

TEST_F(IndexerKlSparse, MatchesPlainLoops) {
  for (const Case& c : {Case{20, 5000, 64, 2048, Lists::RANDOM, "64 heads, 2048 of 5000"},
                        Case{50, 900, 8, 320, Lists::RANDOM, "8 heads, odd number of tiles"},
                        Case{9, 2000, 23, 512, Lists::SHARED, "23 heads"},
                        Case{560, 131072, 2, 192, Lists::RANDOM, "all at one pace"}}) {
    SelectedProblem x(c.t, c.s, c.h, c.k, 100 + c.h, c.kind);
    expect_equal(x, c.what);
  }
}

TEST_F(IndexerKlSparse, LongSequences) {
  for (const Case& c : {Case{600, 4097, 64, 256, Lists::SHARED, "64 heads, shared, 600 rows"},
                        Case{5, 32769, 64, 4096, Lists::LOCAL, "4096 of 32769"},
                        Case{4097, 4097, 16, 128, Lists::LOCAL, "causal, length 4097, 16 heads"},
                        Case{700, 50000, 64, 1024, Lists::RANDOM, "dk larger than the cache"},
                        Case{2500, 131072, 8, 128, Lists::LOCAL, "the same, more rows"},
                        Case{1100, 131072, 4, 320, Lists::LOCAL, "both halves, an odd number of tiles"},
                        Case{1400, 131072, 64, 64, Lists::RANDOM, "one tile a row"},
                        Case{600, 131072, 16, 512, Lists::SHARED, "as many keys, but the same ones"}}) {
    SelectedProblem x(c.t, c.s, c.h, c.k, 100 + c.h, c.kind);
    expect_equal(x, c.what);
  }
}

TEST_F(IndexerKlSparse, PackedDocuments) {  // a row's keys are of its document, at first fewer than fit the list
  SelectedProblem x(700, 700, 32, 64, 61);
  std::mt19937 random(62);
  std::vector<int32_t> seen;
  int32_t document = 0;
  for (int32_t t = 0; t < 700; ++t) {
    if (t == 3 || t == 130 || t == 131 || t == 500) document = t, seen.clear();
    seen.push_back(t);
    std::vector<int32_t> chosen = seen;
    std::shuffle(chosen.begin(), chosen.end(), random);
    chosen.resize(x.lengths[t] = std::min<int32_t>(64, t - document + 1));
    std::sort(chosen.begin(), chosen.end());
    std::copy(chosen.begin(), chosen.end(), &x.indices[t * 64]);
  }
  x.draw_target(63);
  expect_equal(x, "packed documents");
}

// The plain loops themselves: loss = sum_t 0.25 weight[t] KL[t] by the formula, in fp64, at slightly other inputs.
TEST_F(IndexerKlSparse, OracleAgainstFiniteDifferences) {
  SelectedProblem x(12, 200, 4, 64, 71);
  const IndexerKlSparseParams p = x.params();
  const DeviceArray<double> dq(12 * 4 * 128), dw(12 * 4), dk(200 * 128), sums(12 * 3), d(12 * 64);
  reference_indexer_kl_sparse(p, {dq.data(), dw.data(), dk.data()}, sums.data(), d.data());
  std::vector<double> q, key, w;
  for (const uint16_t b : x.q.host()) q.push_back(std::bit_cast<float>(uint32_t{b} << 16));
  for (const uint16_t b : x.key.host()) key.push_back(std::bit_cast<float>(uint32_t{b} << 16));
  for (const float v : x.w.host()) w.push_back(v);
  const auto loss = [&] {
    double total = 0;
    for (int t = 0; t < 12; ++t) {
      std::vector<double> score(64);
      double sum = 0, kl = 0;
      for (int i = 0; i < 64; ++i) {
        for (int j = 0; j < 4; ++j) {
          double dot = 0;
          for (int c = 0; c < 128; ++c) dot += q[t * 520 + j * 128 + c] * key[x.indices[t * 64 + i] * 136 + c];
          score[i] += w[t * 5 + j] * std::max(0., dot);
        }
        sum += std::exp(score[i]);
      }
      for (int i = 0; i < 64; ++i) {
        const double target = x.p[t * 64 + i];
        if (target > 0) kl += target * (std::log(target) - score[i] + std::log(sum));
      }
      total += 0.25 * x.weight[t] * kl;
    }
    return total;
  };
  const auto expect = [&](double& value, const DeviceArray<double>& gradient, int64_t i) {
    const double before = value, h = 1e-5;
    value = before + h;
    const double up = loss();
    value = before - h;
    const double down = loss();
    value = before;
    const std::vector<double> all = gradient.host();
    const double most = *std::max_element(all.begin(), all.end());
    EXPECT_NEAR((up - down) / (2 * h), all[i], 1e-5 * most) << "element " << i;
  };
  int rows = 0;
  for (int t = 0; t < 12; ++t) {
    if (x.weight[t] == 0) continue;
    ++rows;
    const int c = 10 * t + 3, s = x.indices[t * 64 + 5 * t];
    expect(q[t * 520 + 2 * 128 + c], dq, (t * 4 + 2) * 128 + c);
    expect(w[t * 5 + t % 4], dw, t * 4 + t % 4);
    expect(key[s * 136 + c], dk, s * 128 + c);
  }
  EXPECT_GT(rows, 5);
}

TEST_F(IndexerKlSparse, MemoryIsWhatTheHeaderSays) {
  EXPECT_EQ(indexer_kl_sparse_sum_bytes(131072), 131072 * 384 + 128);
  EXPECT_LE(indexer_kl_sparse_workspace_bytes(), 64u);
  SelectedProblem x(300, 2000, 64, 512, 81);
  const IndexerKlSparseParams p = x.params();
  SelectedOutputs got(x);
  const float quantum = got.run_on_its_quantum(p);
  size_t before, after, all;
  cuda::check(cudaMemGetInfo(&before, &all), "ask for free memory");
  got.run(p, quantum);
  cuda::check(cudaMemGetInfo(&after, &all), "ask for free memory");
  EXPECT_EQ(before, after);  // nothing beside the arguments
}

TEST_F(IndexerKlSparse, OddListsAndPoisonedNeighbours) {
  SelectedProblem x(40, 800, 64, 256, 17);
  std::mt19937 random(4);
  for (int t = 0; t < 40; ++t) {
    int32_t* row = &x.indices[t * 256];
    x.lengths[t] = t == 0 ? 0 : t == 1 ? 1 : t == 2 ? 64 : t == 3 ? 65 : 1 + random() % 256;
    for (int i = x.lengths[t]; i < 256; ++i) row[i] = t % 2 ? -1 : 2000000000;  // never read
    if (t == 5)
      for (int i = 0; i < x.lengths[t]; ++i) row[i] = -1;  // no key at all
    if (t == 6) row[x.lengths[t] - 1] = 800;               // just out of range
    if (t == 7) row[0] = -5;
    if (t == 8 && x.lengths[t] > 10) row[10] = row[9];  // a key twice counts once
    for (int i = 0; i < x.lengths[t]; ++i)
      if (row[i] % 3 == 0) row[i] = -1;  // every third key is listed by nobody
  }
  x.draw_target(5);
  std::vector<uint16_t> key = x.key.host();
  constexpr uint16_t kPoison = 0x7FC0;  // a bf16 NaN
  for (int64_t s = 0; s < x.keys; s += 3)
    for (int c = 0; c < 128; ++c) key[s * 136 + c] = kPoison;
  cuda::check(cudaMemcpy(x.key.data(), key.data(), key.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
  expect_equal(x, "odd lists, poisoned neighbours");
}

TEST_F(IndexerKlSparse, OneKeyGivesNoLossAndNoGradient) {
  SelectedProblem x(6, 300, 64, 64, 23);
  for (int32_t& n : x.lengths) n = 1;
  for (int64_t t = 0; t < 6; ++t) x.p[t * 64] = 0.999f;  // a target that does not quite sum to 1
  SelectedOutputs got(x);
  got.run(x.params(), 0x1p-24f);
  for (const float v : got.kl.host()) EXPECT_EQ(v, 0);
  const auto dq = got.dq.host();
  for (int64_t i = 0; i < got.rows * 128; ++i) ASSERT_EQ(dq[i], 0);
  for (const float v : got.dk.host()) ASSERT_EQ(v, 0);
}

TEST_F(
    IndexerKlSparse,
    KeysSelectedByFp8Scores) {  // the loss is that of those scores, its gradient passes the quantiser straight through
  SelectedProblem x(20, 400, 8, 64, 41);
  const auto value = [](uint16_t b) { return std::bit_cast<float>(uint32_t{b} << 16); };
  const auto rounded = [](float v) {
    return static_cast<float>(
        __half(__nv_cvt_fp8_to_halfraw(__nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3), __NV_E4M3)));
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
        for (int c = 0; c < 128; ++c)
          dot += rounded(64 * value(q[t * 1032 + j * 128 + c])) * rounded(64 * value(key[s * 136 + c]));
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
  cuda::check(cudaMemcpy(x.scores.data(), scores.data(), scores.size() * 4, cudaMemcpyHostToDevice),
              "copy to the device");
  expect_equal(x, p, "selected by e4m3 scores");
}

TEST_F(IndexerKlSparse, LargeScores) {  // the softmax is nearly one-hot, p is far from it
  SelectedProblem x(8, 1000, 64, 256, 31);
  fill_normal_f32(x.w.data(), x.w.size(), 5, 0, 1);
  expect_equal(x, "scores of hundreds");
}

// What keys have in common cancels in the exact gradients, as dI sums to 0, and must in the rounded ones.
TEST_F(IndexerKlSparse, KeysWithMuchInCommon) {
  for (const int common : {1, 3}) {
    SelectedProblem x(16, 6000, 64, 2048, 41);
    std::vector<uint16_t> key = x.key.host();
    std::mt19937 random(42);
    std::normal_distribution<float> normal(0, static_cast<float>(common));
    for (int c = 0; c < 128; ++c) {
      const float shift = normal(random);
      for (int64_t s = 0; s < x.keys; ++s) {
        uint16_t& bits = key[s * 136 + c];
        bits = std::bit_cast<uint32_t>(std::bit_cast<float>(uint32_t{bits} << 16) + shift) >> 16;
      }
    }
    cuda::check(cudaMemcpy(x.key.data(), key.data(), key.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
    expect_equal(x, ("a vector and noise, " + std::to_string(common) + " to 1").c_str());
  }
}

TEST_F(IndexerKlSparse, RepeatsBitForBit) {
  SelectedProblem x(600, 2000, 64, 512, 19, Lists::SHARED);
  const IndexerKlSparseParams p = x.params();
  SelectedOutputs got(x);
  const float quantum = got.run_on_its_quantum(p);
  const auto dk = got.dk_sum.host();
  const auto dq = got.dq.host(), dw = got.dw.host(), kl = got.kl.host();
  const auto same = [](const auto& a, const auto& b) {
    return !std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]);
  };
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
  one.workspace = got.workspace.data(), one.workspace_bytes = indexer_kl_sparse_workspace_bytes();
  one.queries = 1, one.quantum = quantum, one.dq = got.dq.data(), one.dq_bf16 = false, one.dw = got.dw.data(),
  one.dk_sum = got.dk_sum.data();
  for (const int t : order) {
    one.q = x.q.data() + t * p.q_stride, one.w = x.w.data() + t * p.w_stride,
    one.indices = p.indices + t * p.indices_stride;
    one.lengths = p.lengths + t, one.p_sel = p.p_sel + t * p.p_stride, one.row_weight = p.row_weight + t;
    one.scores = p.scores + t * p.scores_stride;
    launch_indexer_kl_sparse_sm90(one);
  }
  ASSERT_TRUE(same(got.dk_sum.host(), dk));
}

TEST_F(IndexerKlSparse, QuantumTooSmallIsNoticed) {
  SelectedProblem x(300, 2000, 64, 512, 43, Lists::SHARED);
  const IndexerKlSparseParams p = x.params();
  SelectedOutputs got(x);
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
  SelectedProblem x(2, 100, 8, 64, 37);
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
