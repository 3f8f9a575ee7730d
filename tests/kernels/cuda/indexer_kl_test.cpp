// The dense indexer loss on Hopper against fp64 plain loops: every dI within 1e-4 relative + 4e-6 of the exact one and
// 1e-4 relative L2, row losses, entropies and recall within 1e-3 relative + 1e-5 and within 1e-5 on the whole; every sequence
// longer than the selection.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "kernels/indexer_kl/params.h"
#include "tests/kernels/cuda/indexer_kl_reference.h"
#include "tests/kernels/cuda/selection_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {

enum class Ranges { ALL, CAUSAL, PACKED, RANDOM };

struct Shape {
  int64_t queries, keys;
  int heads;
  Ranges ranges = Ranges::CAUSAL;
  int top_k = 0;        ///< 0: no recall
  bool weights = false;
  bool wide_keys = true;  ///< k as [S,H,192] with the rope part repeated; else [S,H,128] beside [S,64]
  int64_t checked_rows = 48;
};

struct Outputs {
  std::vector<float> kl, entropy_target, entropy_prediction, recall;
  std::vector<float> dI;
};

struct Problem {
  Shape shape;
  uint64_t seed;
  std::vector<int32_t> begins, ends;
  DeviceArray<uint16_t> q, k, rope;
  DeviceArray<int32_t> start, end;
  int64_t logits_stride, dI_stride;
  std::vector<float> logits_h, weight_h;
  DeviceArray<float> logits, weight;
  std::vector<double> lse_h;
  DeviceArray<float> lse;
  std::vector<std::vector<int32_t>> lists;
  DeviceArray<int32_t> selected, lengths;
  DeviceArray<uint8_t> workspace;

  static std::vector<int32_t> bounds(const Shape& s, bool ends, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<int32_t> out(s.queries);
    int64_t document = 0, document_end = 0;
    for (int64_t t = 0; t < s.queries; ++t) {
      const int64_t position = s.keys - s.queries + t;
      while (document_end <= position) {  // packed: documents of 1 to 600 tokens
        document = document_end;
        document_end += random() % 4 == 0 ? 1 : 1 + random() % 600;
      }
      int64_t a = 0, b = s.keys;
      if (s.ranges == Ranges::CAUSAL) b = position + 1;
      if (s.ranges == Ranges::PACKED) a = document, b = position + 1;
      if (s.ranges == Ranges::RANDOM) {
        a = random() % (s.keys + 1), b = random() % (s.keys + 1);
        if (random() % 8 == 0) b = a + 1;
        else if (random() % 8 > 0 && a > b) std::swap(a, b);
      }
      out[t] = static_cast<int32_t>(ends ? b : a);
    }
    return out;
  }
  int64_t begin_of(int64_t t) const { return std::min<int64_t>(begins[t], end_of(t)); }
  int64_t end_of(int64_t t) const { return std::clamp<int64_t>(ends[t], 0, shape.keys); }

  Problem(const Shape& s, uint64_t seed_)
      : shape(s), seed(seed_), begins(bounds(s, false, seed)), ends(bounds(s, true, seed)), q(s.queries * s.heads * 192),
        k(s.keys * s.heads * (s.wide_keys ? 192 : 128)), rope(s.keys * 64), start(begins), end(ends),
        logits_stride((s.keys + 3) / 4 * 4 + 8), dI_stride((s.keys + 7) / 8 * 8 + 8),
        logits_h(make_logits()), weight_h(make_weights()), logits(logits_h), weight(weight_h), lse_h(fill_and_sum()),
        lse(std::vector<float>(lse_h.begin(), lse_h.end())), lists(select()), selected(flat_lists()), lengths(list_lengths()),
        workspace(static_cast<int64_t>(dense_kl_workspace_bytes(s.queries, s.keys))) {}

  std::vector<float> make_logits() const {
    const DeviceArray<float> x(shape.queries * logits_stride);
    fill_normal_f32(x.data(), x.size(), seed + 5, 0, 2);
    std::vector<float> out = x.host();
    for (float& v : out) v = std::round(v * 64) / 64;  // ties for the selection's edge
    for (int64_t t = 0; t < shape.queries; ++t)       // nothing outside a row's range may count
      for (int64_t s = 0; s < logits_stride; ++s)
        if (s < begins[t] || s >= ends[t]) out[t * logits_stride + s] = std::nanf("");
    return out;
  }
  std::vector<float> make_weights() const {
    std::vector<float> out(shape.queries);
    std::mt19937_64 random(seed + 6);
    for (float& x : out) x = random() % 4 == 0 ? 0.f : static_cast<float>(random() % 1000) / 500;
    return out;
  }
  std::vector<double> fill_and_sum() const {
    fill_normal_bf16(q.data(), q.size(), seed + 1);
    fill_normal_bf16(k.data(), k.size(), seed + 2);
    fill_normal_bf16(rope.data(), rope.size(), seed + 3);
    if (shape.wide_keys)
      for (int h = 0; h < shape.heads; ++h)
        cuda::check(cudaMemcpy2D(k.data() + h * 192 + 128, shape.heads * 384, rope.data(), 128, 128, shape.keys, cudaMemcpyDeviceToDevice),
                    "repeat the rope part");
    return reference_lse(params());
  }
  std::vector<std::vector<int32_t>> select() const {
    std::vector<std::vector<int32_t>> out(shape.queries);
    if (shape.top_k > 0)
      for (int64_t t = 0; t < shape.queries; ++t)
        out[t] = reference_top_k(&logits_h[t * logits_stride], begin_of(t), end_of(t), shape.top_k);
    return out;
  }
  std::vector<int32_t> flat_lists() const {
    std::vector<int32_t> out(shape.queries * std::max(shape.top_k, 1), -1);
    for (int64_t t = 0; t < shape.queries; ++t) std::copy(lists[t].begin(), lists[t].end(), out.begin() + t * shape.top_k);
    return out;
  }
  std::vector<int32_t> list_lengths() const {
    std::vector<int32_t> out;
    for (const auto& l : lists) out.push_back(static_cast<int32_t>(l.size()));
    return out;
  }

  AttentionMassParams params() const {
    AttentionMassParams p;
    p.queries = shape.queries, p.keys = shape.keys, p.heads = shape.heads;
    p.scale = 0.12f;
    p.q = q.data(), p.q_stride = shape.heads * 192, p.q_head_stride = 192;
    const int width = shape.wide_keys ? 192 : 128;
    p.k = k.data(), p.k_stride = shape.heads * width, p.k_head_stride = width;
    p.k_rope = shape.wide_keys ? k.data() + 128 : rope.data(), p.k_rope_stride = shape.wide_keys ? p.k_stride : 64;
    p.lse = lse.data(), p.lse_stride = shape.heads, p.lse_head_stride = 1;
    if (shape.ranges != Ranges::ALL) p.start = start.data(), p.end = end.data();
    p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
    return p;
  }

  // The kernels' results, from poisoned memory; in two phases: by way of the mass in memory.
  Outputs run(bool two_phases = false) const {
    const AttentionMassParams p = params();
    const int64_t T = shape.queries;
    const DeviceArray<float> kl(T), target(T), prediction(T), recall(T), mass(two_phases ? T * logits_stride : 0);
    const DeviceArray<float> dI(T * dI_stride);
    kl.fill_bytes(0xFF), target.fill_bytes(0xFF), prediction.fill_bytes(0xFF), recall.fill_bytes(0xFF), dI.fill_bytes(0xFF);
    workspace.fill_bytes(0xFF);
    mass.fill_bytes(0xFF);
    DenseKlRows rows;
    rows.all_heads = shape.heads;
    rows.logits = logits.data(), rows.logits_stride = logits_stride;
    if (shape.top_k > 0) rows.selected = selected.data(), rows.selected_stride = shape.top_k, rows.selected_lengths = lengths.data();
    if (shape.weights) rows.row_weight = weight.data(), rows.loss_scale = 0.5f;
    rows.kl = kl.data(), rows.entropy_target = target.data(), rows.entropy_prediction = prediction.data(), rows.recall = recall.data();
    rows.dI = dI.data(), rows.dI_stride = dI_stride;
    if (two_phases) {
      launch_attention_mass_sm90(p, mass.data(), logits_stride);
      launch_dense_kl_of_mass_sm90(p, mass.data(), logits_stride, rows);
    } else {
      launch_dense_kl_sm90(p, rows);
    }
    cuda::check(cudaDeviceSynchronize(), "run the dense indexer loss");
    return {kl.host(), target.host(), prediction.host(), recall.host(), dI.host()};
  }
};

bool near(double got, double want) { return std::abs(got - want) <= 1e-3 * std::abs(want) + 1e-5; }

class IndexerKl : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) {
      std::puts("no CUDA device");
      GTEST_SKIP();
    }
  }

  void expect_equal(const Shape& shape, uint64_t seed) {
    const Problem problem(shape, seed);
    const AttentionMassParams p = problem.params();
    std::vector<int64_t> rows;
    std::mt19937_64 random(seed);
    for (int64_t i = 0; i < std::min(shape.checked_rows, shape.queries); ++i)
      rows.push_back(shape.queries <= shape.checked_rows ? i : i == 0 ? 0 : i == 1 ? shape.queries - 1 : random() % shape.queries);
    const std::vector<double> mass = reference_mass(p, problem.lse_h, rows);
    for (const bool two_phases : {false, true}) {
      const Outputs got = problem.run(two_phases);
      double error = 0, norm = 0, worst = 0;
      for (size_t i = 0; i < rows.size(); ++i) {
        const int64_t t = rows[i], begin = problem.begin_of(t), end = problem.end_of(t);
        const ReferenceKl want = reference_kl(&mass[i * shape.keys], &problem.logits_h[t * problem.logits_stride], shape.keys, begin,
                                              end, shape.heads, problem.lists[t], shape.weights ? 0.5 * problem.weight_h[t] : 1);
        const auto expect = [&](const char* what, float x, double y) {
          EXPECT_TRUE(near(x, y)) << what << " of row " << t << " [" << begin << ", " << end << "): " << x << " instead of " << y;
          worst = std::max(worst, std::abs(x - y) / (std::abs(y) + 1e-2));
        };
        expect("KL", got.kl[t], want.kl);
        expect("entropy of the target", got.entropy_target[t], want.entropy_target);
        expect("entropy of the prediction", got.entropy_prediction[t], want.entropy_prediction);
        expect("recall", got.recall[t], want.recall);
        if (end - begin <= 1) {
          EXPECT_EQ(got.kl[t], 0.f);
          if (end > begin) {
            EXPECT_EQ(got.dI[t * problem.dI_stride + begin], 0);
          }
        }
        for (int64_t s = begin; s < end; ++s) {
          const double x = got.dI[t * problem.dI_stride + s], y = want.dI[s];
          error += (x - y) * (x - y), norm += y * y;
          if (!(std::abs(x - y) <= std::abs(y) * 1e-4 + 4e-6))
            ADD_FAILURE() << "dI of row " << t << " key " << s << ": " << x << " instead of " << y;
        }
        for (int64_t s = shape.keys + shape.keys % 2; s < problem.dI_stride; ++s)
          ASSERT_TRUE(std::isnan(got.dI[t * problem.dI_stride + s])) << "row " << t << " was written beyond the keys";
      }
      EXPECT_TRUE(std::sqrt(error) <= 1e-4 * std::sqrt(norm)) << std::sqrt(error / norm);
      EXPECT_LE(worst, 1e-5);
      std::printf("%ld x %ld, %d heads, %s: dI %.2e, row values %.2e\n", static_cast<long>(shape.queries), static_cast<long>(shape.keys),
                  shape.heads, two_phases ? "two phases" : "one pass", norm > 0 ? std::sqrt(error / norm) : 0., worst);
    }
  }
};

TEST_F(IndexerKl, Lengths) {
  for (const int64_t n : {1, 127, 128, 129}) expect_equal({n, n, 128, Ranges::CAUSAL, 64}, n);
  expect_equal({4097, 4097, 16, Ranges::CAUSAL, 512}, 5);
  expect_equal({300, 32769, 8, Ranges::CAUSAL, 2048}, 6);
  expect_equal({16, 131072, 128, Ranges::CAUSAL, 2048}, 7);
}

TEST_F(IndexerKl, Small) { expect_equal({40, 300, 2, Ranges::CAUSAL, 16, true}, 3); }

TEST_F(IndexerKl, Heads) {
  for (const int heads : {1, 2, 3, 64}) expect_equal({200, 900, heads, Ranges::CAUSAL, 128, true}, 20 + heads);
}

TEST_F(IndexerKl, RangesWeightsAndLayouts) {
  for (const bool wide : {true, false}) {
    expect_equal({1500, 1500, 5, Ranges::PACKED, 64, true, wide, 400}, 31);
    expect_equal({700, 2000, 4, Ranges::RANDOM, 100, true, wide, 400}, 32);
    expect_equal({130, 517, 3, Ranges::ALL, 0, false, wide}, 33);
  }
}

TEST_F(IndexerKl, SameBitsEveryTime) {
  const Problem problem({1000, 3000, 16, Ranges::CAUSAL, 256, true}, 41);
  for (const bool two_phases : {false, true}) {
    const Outputs first = problem.run(two_phases);
    for (int i = 0; i < 20; ++i) {
      const Outputs again = problem.run(two_phases);
      ASSERT_EQ(std::memcmp(first.kl.data(), again.kl.data(), 4 * first.kl.size()), 0);
      ASSERT_EQ(std::memcmp(first.recall.data(), again.recall.data(), 4 * first.recall.size()), 0);
      ASSERT_EQ(std::memcmp(first.dI.data(), again.dI.data(), 4 * first.dI.size()), 0);
    }
  }
}

TEST_F(IndexerKl, Refuses) {
  AttentionMassParams p;
  const char* why = nullptr;
  EXPECT_FALSE(sm90_supports(p, &why));
  EXPECT_STREQ(why, "the number of heads is not in 1 to 65536");
  const Problem problem({10, 100, 2}, 51);
  p = problem.params();
  p.workspace_bytes = 1;
  EXPECT_THROW(launch_dense_kl_sm90(p, {}), std::runtime_error);
  p = problem.params();
  EXPECT_THROW(launch_dense_kl_sm90(p, {}), std::runtime_error);  // all_heads = 0
  p.k_head_stride = 129;
  EXPECT_THROW(launch_attention_mass_sm90(p, nullptr, 0), std::runtime_error);
}

}  // namespace
}  // namespace dsa::test
