// The dense warm-up in one call against fp64 plain loops from the indexer's inputs to its gradients: loss within 1e-3
// relative + 1e-5, dq, dw and dk within 2e-3 relative L2 (dI and dI w are rounded to bf16 once each). The oracle's own
// gradients are held against finite differences.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "kernels/indexer_kl/dense_params.h"
#include "tests/kernels/cuda/indexer_kl_reference.h"
#include "tests/kernels/cuda/selection_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {

constexpr int kDim = 128;

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
uint16_t bf16_of(float x) {  // of values that bf16 holds exactly
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}
float from_e4m3(uint8_t c) {
  const int e = c >> 3 & 15, m = c & 7;
  const float x = e ? std::ldexp(1.f + m / 8.f, e - 7) : std::ldexp(m / 8.f, -6);
  return c & 0x80 ? -x : x;
}

struct Gradients {
  double loss = 0;
  std::vector<double> kl, dq, dw, dk;
};

struct Problem {
  int64_t rows, keys;
  int heads, indexer_heads, top_k;
  IndexerDtype dtype;
  DeviceArray<uint16_t> q, k, iq, ik;
  DeviceArray<uint8_t> iq8, ik8;
  DeviceArray<float> w, lse, weight;
  std::vector<int32_t> begins, ends;
  DeviceArray<int32_t> start, end;
  std::vector<double> q_h, k_h, w_h, mass;
  std::vector<float> weight_h;

  static std::vector<int32_t> bounds(int64_t rows, int64_t keys, bool ends) {
    std::vector<int32_t> out;
    for (int64_t t = 0; t < rows; ++t) {  // two documents
      const int64_t position = keys - rows + t, second = keys - rows / 3;
      out.push_back(static_cast<int32_t>(ends ? position + 1 : position >= second ? second : 0));
    }
    return out;
  }

  Problem(int64_t rows, int64_t keys, int heads, int indexer_heads, int top_k, IndexerDtype dtype)
      : rows(rows),
        keys(keys),
        heads(heads),
        indexer_heads(indexer_heads),
        top_k(top_k),
        dtype(dtype),
        q(rows * heads * 192),
        k(keys * heads * 192),
        iq(rows * indexer_heads * kDim),
        ik(keys * kDim),
        iq8(iq.size()),
        ik8(ik.size()),
        w(rows * indexer_heads),
        lse(rows * heads),
        weight(rows),
        begins(bounds(rows, keys, false)),
        ends(bounds(rows, keys, true)),
        start(begins),
        end(ends) {
    fill_normal_bf16(q.data(), q.size(), 1);
    fill_normal_bf16(k.data(), k.size(), 2);
    for (int h = 1; h < heads; ++h)
      cuda::check(cudaMemcpy2D(k.data() + h * 192 + 128, heads * 384, k.data() + 128, heads * 384, 128, keys,
                               cudaMemcpyDeviceToDevice),
                  "repeat the rope part");
    fill_normal_f32(w.data(), w.size(), 3, 0, 0.02f);
    fill_inputs(iq, iq8, 4);
    fill_inputs(ik, ik8, 5);
    for (int64_t t = 0; t < rows; ++t) weight_h.push_back(t % 5 == 0 ? 0.f : 1.f + t % 3);
    cuda::check(cudaMemcpy(weight.data(), weight_h.data(), rows * 4, cudaMemcpyHostToDevice), "copy weights");
    const std::vector<double> lse_h = reference_lse(params().attention);
    cuda::check(cudaMemcpy(lse.data(), std::vector<float>(lse_h.begin(), lse_h.end()).data(), rows * heads * 4,
                           cudaMemcpyHostToDevice),
                "copy the log-sum-exp");
    std::vector<int64_t> all(rows);
    for (int64_t t = 0; t < rows; ++t) all[t] = t;
    mass = reference_mass(params().attention, lse_h, all);
    for (const uint16_t x : iq.host()) q_h.push_back(from_bf16(x));
    for (const uint16_t x : ik.host()) k_h.push_back(from_bf16(x));
    for (const float x : w.host()) w_h.push_back(x);
  }

  // e4m3 codes and the same values as bf16.
  void fill_inputs(const DeviceArray<uint16_t>& x, const DeviceArray<uint8_t>& codes, uint64_t seed) const {
    if (dtype == IndexerDtype::BF16) return fill_normal_bf16(x.data(), x.size(), seed);
    fill_normal_e4m3(codes.data(), codes.size(), seed, 1);
    std::vector<uint16_t> values;
    for (const uint8_t c : codes.host()) values.push_back(bf16_of(from_e4m3(c)));
    cuda::check(cudaMemcpy(x.data(), values.data(), 2 * values.size(), cudaMemcpyHostToDevice), "copy inputs");
  }

  IndexerKlDenseParams params() const {
    IndexerKlDenseParams p;
    AttentionMassParams& a = p.attention;
    a.queries = rows, a.keys = keys, a.heads = heads, a.scale = 0.12f;
    a.q = q.data(), a.q_stride = heads * 192, a.q_head_stride = 192;
    a.k = k.data(), a.k_stride = heads * 192, a.k_head_stride = 192, a.k_rope = k.data() + 128,
    a.k_rope_stride = heads * 192;
    a.lse = lse.data(), a.lse_stride = heads, a.lse_head_stride = 1;
    a.start = start.data(), a.end = end.data();
    const bool fp8 = dtype == IndexerDtype::E4M3;
    p.scores.dtype = dtype, p.scores.heads = indexer_heads, p.scores.dim = kDim;
    p.scores.q = fp8 ? static_cast<const void*>(iq8.data()) : iq.data(), p.scores.q_stride = indexer_heads * kDim;
    p.scores.k = fp8 ? static_cast<const void*>(ik8.data()) : ik.data(), p.scores.k_stride = kDim;
    p.scores.w = w.data(), p.scores.w_stride = indexer_heads;
    p.gradient.heads = indexer_heads;
    p.gradient.q = iq.data(), p.gradient.q_stride = indexer_heads * kDim, p.gradient.k = ik.data(),
    p.gradient.k_stride = kDim;
    p.gradient.w = w.data(), p.gradient.w_stride = indexer_heads;
    p.rows.all_heads = heads, p.rows.row_weight = weight.data(), p.rows.loss_scale = 0.25f;
    p.top_k = top_k;
    return p;
  }

  double dot(int64_t t, int j, int64_t s) const {
    double sum = 0;
    for (int d = 0; d < kDim; ++d) sum += q_h[(t * indexer_heads + j) * kDim + d] * k_h[s * kDim + d];
    return sum;
  }

  // Losses, and gradients of loss = sum_t 0.25 weight[t] KL[t] when wanted.
  Gradients oracle(bool gradients) const {
    Gradients g;
    if (gradients) g.dq.assign(q_h.size(), 0), g.dw.assign(w_h.size(), 0), g.dk.assign(k_h.size(), 0);
    std::vector<double> dots, score(keys);
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t n = ends[t] - begins[t];
      dots.assign(n * indexer_heads, 0);
      double most = -INFINITY, sum = 0, kl = 0;
      for (int64_t i = 0; i < n; ++i) {
        score[i] = 0;
        for (int j = 0; j < indexer_heads; ++j) {
          const double x = dots[i * indexer_heads + j] = dot(t, j, begins[t] + i);
          score[i] += w_h[t * indexer_heads + j] * std::fmax(x, 0);
        }
        most = std::fmax(most, score[i]);
      }
      for (int64_t i = 0; i < n; ++i) sum += std::exp(score[i] - most);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t s = begins[t] + i;
        const double p = mass[t * keys + s] / heads, log_q = score[i] - most - std::log(sum);
        kl += p * (std::log(p) - log_q);
        if (!gradients) continue;
        const double dI = 0.25 * weight_h[t] * (std::exp(log_q) - p);
        for (int j = 0; j < indexer_heads; ++j) {
          const double x = dots[i * indexer_heads + j];
          if (x <= 0) continue;
          const int64_t tj = t * indexer_heads + j;
          g.dw[tj] += dI * x;
          for (int d = 0; d < kDim; ++d) {
            g.dq[tj * kDim + d] += dI * w_h[tj] * k_h[s * kDim + d];
            g.dk[s * kDim + d] += dI * w_h[tj] * q_h[tj * kDim + d];
          }
        }
      }
      g.kl.push_back(kl);
      g.loss += 0.25 * weight_h[t] * kl;
    }
    return g;
  }
};

double relative_error(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) error += (got[i] - want[i]) * (got[i] - want[i]), norm += want[i] * want[i];
  return error == 0 ? 0 : std::sqrt(error / norm);
}

struct Outputs {
  std::vector<float> kl, recall, dq, dw, dk;
};

// mass: [T,S] of all heads; null: made by the call.
Outputs run(const Problem& problem, int64_t block_rows, const float* mass = nullptr) {
  IndexerKlDenseParams p = problem.params();
  if (mass) p.mass = mass, p.mass_stride = problem.keys, p.attention.q = p.attention.k = p.attention.lse = nullptr;
  const int64_t T = problem.rows, TJ = T * problem.indexer_heads;
  const DeviceArray<float> kl(T), recall(T), dq(TJ * kDim), dw(TJ), dk(problem.keys * kDim);
  kl.fill_bytes(0xFF), recall.fill_bytes(0xFF), dq.fill_bytes(0xFF), dw.fill_bytes(0xFF);
  dk.fill_bytes(0);
  p.rows.kl = kl.data(), p.rows.recall = recall.data();
  p.gradient.dq = dq.data(), p.gradient.dq_bf16 = false, p.gradient.dw = dw.data(), p.gradient.dk = dk.data();
  p.workspace_bytes = indexer_kl_dense_workspace_bytes(p, block_rows);
  const DeviceArray<uint8_t> workspace(static_cast<int64_t>(p.workspace_bytes) + 64);
  workspace.fill_bytes(0xFF);
  p.workspace = workspace.data();
  launch_indexer_kl_dense_sm90(p);
  cuda::check(cudaDeviceSynchronize(), "run the dense indexer loss");
  std::array<uint8_t, 64> end;
  cuda::check(cudaMemcpy(end.data(), workspace.data() + p.workspace_bytes, 64, cudaMemcpyDeviceToHost), "copy");
  for (const uint8_t x : end) EXPECT_EQ(x, 0xFF) << "written past the end";
  return {kl.host(), recall.host(), dq.host(), dw.host(), dk.host()};
}

class IndexerKlDense : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) {
      std::puts("no CUDA device");
      GTEST_SKIP();
    }
  }
  static void expect_equal(const Problem& problem, const Gradients& want, const Outputs& got) {
    for (int64_t t = 0; t < problem.rows; ++t) {
      EXPECT_NEAR(got.kl[t], want.kl[t], 1e-3 * std::abs(want.kl[t]) + 1e-5) << "row " << t;
      if (problem.ends[t] - problem.begins[t] <= problem.top_k)
        EXPECT_NEAR(got.recall[t], 1, 1e-4) << "row " << t;
      else
        EXPECT_LT(got.recall[t], 1) << "row " << t;
    }
    const double dq = relative_error(got.dq, want.dq), dw = relative_error(got.dw, want.dw),
                 dk = relative_error(got.dk, want.dk);
    std::printf("relative L2: dq %.2e, dw %.2e, dk %.2e\n", dq, dw, dk);
    EXPECT_TRUE(dq <= 2e-3 && dw <= 2e-3 && dk <= 2e-3);
  }
};

TEST_F(IndexerKlDense, LossAndGradients) {
  const Problem problem(600, 700, 6, 8, 128, IndexerDtype::BF16);
  const Gradients want = problem.oracle(true);
  const Outputs whole = run(problem, 4096), again = run(problem, 4096), blocks = run(problem, 256);
  expect_equal(problem, want, whole);
  expect_equal(problem, want, blocks);
  EXPECT_EQ(whole.kl, again.kl);
  EXPECT_EQ(whole.dq, again.dq);
  EXPECT_EQ(whole.dw, again.dw);
  EXPECT_EQ(whole.dk, again.dk);
  EXPECT_EQ(whole.kl, blocks.kl);
  EXPECT_EQ(whole.recall, blocks.recall);
}

TEST_F(IndexerKlDense, MassOfRanksThatHoldSomeOfTheHeads) {
  const Problem problem(300, 700, 6, 8, 128, IndexerDtype::BF16);
  const DeviceArray<float> part(problem.rows * problem.keys);
  std::vector<float> sum(part.size(), 0);
  for (const auto& [first, heads] : {std::pair{0, 2}, {2, 4}}) {
    AttentionMassParams a = problem.params().attention;
    a.heads = heads, a.q = problem.q.data() + first * 192, a.k = problem.k.data() + first * 192, a.lse = problem.lse.data() + first;
    const DeviceArray<uint8_t> workspace(static_cast<int64_t>(dense_kl_workspace_bytes(a.queries, a.keys)));
    a.workspace = workspace.data(), a.workspace_bytes = workspace.size();
    part.fill_bytes(0);
    launch_attention_mass_sm90(a, part.data(), problem.keys);
    const std::vector<float> got = part.host();
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += got[i];
  }
  EXPECT_LT(relative_error(sum, problem.mass), 1e-3);
  expect_equal(problem, problem.oracle(true), run(problem, 256, DeviceArray<float>(sum).data()));
}

TEST_F(IndexerKlDense, Lengths) {
  struct Case {
    int64_t rows, keys;
  };
  for (const Case& c : {Case{1, 1}, Case{127, 127}, Case{128, 128}, Case{129, 129}, Case{40, 4097}, Case{12, 32769}}) {
    SCOPED_TRACE(c.keys);
    const Problem problem(c.rows, c.keys, 6, 8, 64, IndexerDtype::BF16);
    expect_equal(problem, problem.oracle(true), run(problem, 4096));
  }
}

TEST_F(IndexerKlDense, NothingAllocatedBesideTheWorkspace) {
  const Problem problem(600, 700, 6, 8, 128, IndexerDtype::BF16);
  IndexerKlDenseParams p = problem.params();
  const DeviceArray<float> dq(600 * 8 * kDim), dw(600 * 8), dk(700 * kDim);
  p.gradient.dq = dq.data(), p.gradient.dq_bf16 = false, p.gradient.dw = dw.data(), p.gradient.dk = dk.data();
  p.workspace_bytes = indexer_kl_dense_workspace_bytes(p, 256);
  const DeviceArray<uint8_t> workspace(static_cast<int64_t>(p.workspace_bytes));
  p.workspace = workspace.data();
  size_t before = 0, after = 0, all;
  for (size_t* const free : {&before, &before, &after}) {  // the first time the kernels are loaded
    dk.fill_bytes(0);
    launch_indexer_kl_dense_sm90(p);
    cuda::check(cudaDeviceSynchronize(), "run the dense indexer loss");
    cuda::check(cudaMemGetInfo(free, &all), "ask for free memory");
  }
  EXPECT_EQ(before, after);
}

TEST_F(IndexerKlDense, ScoresInE4M3PassTheGradientStraightThrough) {
  const Problem problem(300, 500, 3, 16, 64, IndexerDtype::E4M3);
  expect_equal(problem, problem.oracle(true), run(problem, 4096));
}

TEST_F(IndexerKlDense, OracleAgainstFiniteDifferences) {
  Problem problem(40, 90, 2, 4, 16, IndexerDtype::BF16);
  const Gradients want = problem.oracle(true);
  const auto difference = [&](double& x) {
    const double before = x, h = 1e-5;
    x = before + h;
    const double up = problem.oracle(false).loss;
    x = before - h;
    const double down = problem.oracle(false).loss;
    x = before;
    return (up - down) / (2 * h);
  };
  for (const size_t i : {3u, 700u, 9001u})
    EXPECT_NEAR(difference(problem.q_h[i]), want.dq[i], 1e-6 * (1 + std::abs(want.dq[i])));
  for (const size_t i : {3u, 700u, 9001u})
    EXPECT_NEAR(difference(problem.k_h[i]), want.dk[i], 1e-6 * (1 + std::abs(want.dk[i])));
  for (const size_t i : {5u, 77u, 150u})
    EXPECT_NEAR(difference(problem.w_h[i]), want.dw[i], 1e-6 * (1 + std::abs(want.dw[i])));
}

// At the greatest length, blocks of 4096 rows: the formula of the header, and 3 GB.
TEST_F(IndexerKlDense, WorkspaceIsWhatTheHeaderSays) {
  IndexerKlDenseParams p;
  p.attention.queries = p.attention.keys = 131072;
  p.attention.heads = p.rows.all_heads = 128;
  p.scores.heads = p.gradient.heads = 64, p.scores.dim = 128;
  p.top_k = 2048;
  p.gradient.dq = reinterpret_cast<void*>(256);
  const double rows = 4096, keys = 131072;
  IndexerBackwardParams block = p.gradient;
  block.queries = 4096, block.keys = 131072;
  const double whole = static_cast<double>(indexer_kl_dense_workspace_bytes(p, 4096));
  const double bytes = whole - static_cast<double>(indexer_backward_workspace_bytes(block));
  const double formula = rows * (4 * keys + keys / 256 * 16 + 4 * p.top_k) + rows / 256 * keys / 256 * 8;
  EXPECT_GE(bytes, formula);
  EXPECT_LE(bytes, formula + 32 * rows + 4096);
  EXPECT_LE(whole, 3e9);
}

}  // namespace
}  // namespace dsa::test
