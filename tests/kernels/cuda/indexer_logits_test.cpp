// The Hopper scores against fp64 of the same quantised inputs, relative L2 per row: e4m3 2e-4 (the tensor core keeps about 14
// bits of a product's sum), bf16 1e-6 (fp32 accumulation). Weights of both signs may cancel, so bf16 rows of few keys are held
// to four times that, relative to the sum of absolute values.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "kernels/indexer_logits/params.h"
#include "tests/kernels/cuda/selection_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {

constexpr uint32_t kPoison = 0x7FC0BEEF;  // a NaN that no kernel makes

enum class Ranges { NONE, CAUSAL, RANDOM };

struct Shape {
  int64_t queries, keys;
  int heads, dim;
  IndexerDtype dtype;
  Ranges ranges;
};

struct Problem {
  Shape shape;
  DeviceArray<uint8_t> q, k;
  DeviceArray<float> w, k_scale;
  std::vector<int32_t> begins, ends;
  DeviceArray<int32_t> start, end;

  static std::vector<int32_t> bounds(const Shape& s, bool ends, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<int32_t> out(s.queries);
    for (int64_t t = 0; t < s.queries; ++t) {
      int64_t a = random() % (s.keys + 1), b = random() % (s.keys + 1);
      switch (random() % 8) {
        case 0: b = a; break;             // empty
        case 1: b = a + 1; break;         // one key
        case 2: a = 0, b = s.keys; break; // full
        case 3: std::swap(a, b); break;   // possibly reversed: empty
        default: if (a > b) std::swap(a, b);
      }
      if (s.ranges == Ranges::CAUSAL) a = 0, b = s.keys - s.queries + t + 1;
      out[t] = static_cast<int32_t>(ends ? b : a);
    }
    return out;
  }

  Problem(const Shape& s, uint64_t seed)
      : shape(s), q(s.queries * s.heads * s.dim * 2), k(s.keys * s.dim * 2), w(s.queries * s.heads), k_scale(s.keys),
        begins(bounds(s, false, seed)), ends(bounds(s, true, seed)), start(begins), end(ends) {
    const auto fill = [&](const DeviceArray<uint8_t>& a, int64_t n, uint64_t seed) {
      if (s.dtype == IndexerDtype::E4M3) fill_normal_e4m3(a.data(), n, seed);
      else fill_normal_bf16(a.data(), n, seed);
    };
    fill(q, s.queries * s.heads * s.dim, seed + 1);
    fill(k, s.keys * s.dim, seed + 2);
    fill_normal_f32(w.data(), w.size(), seed + 3);
    std::vector<float> scales(s.keys);
    std::mt19937_64 random(seed);
    for (float& x : scales) x = std::ldexp(1.f, static_cast<int>(random() % 7) - 10);
    cuda::check(cudaMemcpy(k_scale.data(), scales.data(), scales.size() * 4, cudaMemcpyHostToDevice), "copy scales");
  }

  IndexerLogitsParams params() const {
    IndexerLogitsParams p;
    p.dtype = shape.dtype;
    p.queries = shape.queries, p.keys = shape.keys, p.heads = shape.heads, p.dim = shape.dim;
    p.q = q.data(), p.q_stride = shape.heads * shape.dim;
    p.k = k.data(), p.k_stride = shape.dim;
    p.w = w.data(), p.w_stride = shape.heads;
    if (shape.dtype == IndexerDtype::E4M3) p.k_scale = k_scale.data();
    if (shape.ranges != Ranges::NONE) p.start = start.data(), p.end = end.data();
    p.logits_stride = shape.keys + 5;
    return p;
  }
  int64_t begin_of(int64_t t) const { return shape.ranges == Ranges::NONE ? 0 : std::clamp<int64_t>(begins[t], 0, shape.keys); }
  int64_t end_of(int64_t t) const { return shape.ranges == Ranges::NONE ? shape.keys : std::clamp<int64_t>(ends[t], 0, shape.keys); }
};

DeviceArray<float> poisoned(int64_t n) {
  return DeviceArray<float>([&] {
    std::vector<float> v(n);
    for (float& x : v) std::memcpy(&x, &kPoison, 4);
    return v;
  }());
}

class IndexerLogits : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) {
      std::puts("no CUDA device");
      GTEST_SKIP();
    }
  }

  // Worst relative L2 error of the rows compared; for bf16, of those of at least 800 keys.
  double expect_equal(const Shape& shape, uint64_t seed, int64_t most_rows = 24) {
    const Problem problem(shape, seed);
    IndexerLogitsParams p = problem.params();
    const DeviceArray<float> out = poisoned(p.queries * p.logits_stride);
    p.logits = out.data();
    launch_indexer_logits_sm90(p);
    cuda::check(cudaDeviceSynchronize(), "run indexer_logits");
    const std::vector<float> got = out.host();
    std::vector<int64_t> rows;
    std::mt19937_64 random(seed);
    for (int64_t i = 0; i < std::min(most_rows, p.queries); ++i)
      rows.push_back(p.queries <= most_rows ? i : i == 0 ? 0 : i == 1 ? p.queries - 1 : random() % p.queries);
    const ReferenceLogits want = reference_logits(p, rows);
    const bool fp8 = shape.dtype == IndexerDtype::E4M3;
    double worst = 0, worst_of_size = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t t = rows[i];
      double error = 0, norm = 0, size = 0;
      int64_t keys = 0;
      for (int64_t s = 0; s < p.logits_stride; ++s) {
        const float x = got[t * p.logits_stride + s];
        if (s >= problem.begin_of(t) && s < problem.end_of(t)) {
          const double y = want.value[i * p.keys + s], z = want.magnitude[i * p.keys + s];
          error += (x - y) * (x - y), norm += y * y, size += z * z, ++keys;
        } else {
          uint32_t bits;
          std::memcpy(&bits, &x, 4);
          if (bits != kPoison) {
            ADD_FAILURE() << "row " << t << " key " << s << " lies outside the range and was written";
            return 1;
          }
        }
      }
      if (error > 0 && (fp8 || keys >= 800)) worst = std::max(worst, std::sqrt(error / norm));
      if (size > 0) worst_of_size = std::max(worst_of_size, std::sqrt(error / size));
      if (!(error == error)) worst = 1;
    }
    const double bound = fp8 ? 2e-4 : 1e-6;
    EXPECT_LE(std::max(worst, worst_of_size / 4), bound)
        << "queries " << shape.queries << " keys " << shape.keys << " heads " << shape.heads << " dim " << shape.dim
        << (fp8 ? " e4m3" : " bf16");
    return worst;
  }
};

TEST_F(IndexerLogits, HeadsAndSizes) {
  for (const IndexerDtype dtype : {IndexerDtype::E4M3, IndexerDtype::BF16}) {
    double worst = 0;
    for (const int heads : {64, 32, 16, 8, 4, 1, 48})
      worst = std::max(worst, expect_equal({130, 1000, heads, 128, dtype, Ranges::CAUSAL}, 11 + heads));
    for (const int64_t queries : {1, 3, 4097})
      for (const int64_t keys : {1, 7, 63, 128, 129, 2049}) expect_equal({queries, keys, 64, 128, dtype, Ranges::NONE}, 31 * keys + queries);
    for (const int64_t queries : {1, 3, 261})
      worst = std::max(worst, expect_equal({queries, 131073, 64, 128, dtype, Ranges::CAUSAL}, queries, 8));
    worst = std::max(worst, expect_equal({130, 1000, 64, 64, dtype, Ranges::CAUSAL}, 5));
    std::printf("worst relative L2 of a causal row, %s: %.2e\n", dtype == IndexerDtype::E4M3 ? "e4m3" : "bf16", worst);
  }
}

// Every length up to past the one from which the e4m3 instructions are exact enough, weights of both signs.
TEST_F(IndexerLogits, ShortRowsOfE4m3) {
  for (const int heads : {64, 16}) {
    const double worst = expect_equal({1100, 1100, heads, 128, IndexerDtype::E4M3, Ranges::CAUSAL}, 23 + heads, 1100);
    std::printf("worst relative L2 of rows of 1 to 1100 keys, %d heads: %.2e\n", heads, worst);
  }
}

TEST_F(IndexerLogits, RandomRanges) {
  for (const IndexerDtype dtype : {IndexerDtype::E4M3, IndexerDtype::BF16})
    for (const int heads : {64, 16, 8}) expect_equal({700, 3000, heads, 128, dtype, Ranges::RANDOM}, 77 + heads, 128);
}

TEST_F(IndexerLogits, FillsOutside) {
  const Problem problem({70, 900, 64, 128, IndexerDtype::BF16, Ranges::RANDOM}, 3);
  IndexerLogitsParams p = problem.params();
  const DeviceArray<float> out = poisoned(p.queries * p.logits_stride);
  p.logits = out.data();
  p.fill_outside = true;
  launch_indexer_logits_sm90(p);
  const std::vector<float> got = out.host();
  for (int64_t t = 0; t < p.queries; ++t)
    for (int64_t s = 0; s < p.keys; ++s)
      ASSERT_EQ(s < problem.begin_of(t) || s >= problem.end_of(t), got[t * p.logits_stride + s] == -INFINITY) << t << " " << s;
}

// A row's scores depend on nothing but the row: alone, shifted against the blocks of queries, and again.
TEST_F(IndexerLogits, Deterministic) {
  for (const IndexerDtype dtype : {IndexerDtype::E4M3, IndexerDtype::BF16}) {
    const Problem problem({300, 5000, 64, 128, dtype, Ranges::CAUSAL}, 9);
    IndexerLogitsParams p = problem.params();
    const DeviceArray<float> out = poisoned(p.queries * p.logits_stride), again = poisoned(p.queries * p.logits_stride);
    p.logits = out.data();
    launch_indexer_logits_sm90(p);
    const std::vector<float> want = out.host();
    const int64_t element = dtype == IndexerDtype::E4M3 ? 1 : 2;
    for (const int64_t cut : {0, 1, 77, 299}) {
      again.fill_bytes(0xFF);
      for (const bool second : {false, true}) {
        IndexerLogitsParams part = p;
        const int64_t t = second ? cut : 0;
        part.queries = second ? p.queries - cut : cut;
        part.q = static_cast<const char*>(p.q) + t * p.q_stride * element;
        part.w += t * p.w_stride, part.start += t, part.end += t;
        part.logits = again.data() + t * p.logits_stride;
        launch_indexer_logits_sm90(part);
      }
      const std::vector<float> got = again.host();
      for (int64_t t = 0; t < p.queries; ++t)
        ASSERT_EQ(0, std::memcmp(&got[t * p.logits_stride], &want[t * p.logits_stride], problem.end_of(t) * 4)) << t;
    }
  }
}

TEST_F(IndexerLogits, KeepsNaN) {
  const Problem problem({8, 300, 64, 128, IndexerDtype::BF16, Ranges::NONE}, 4);
  IndexerLogitsParams p = problem.params();
  const uint16_t nan = 0x7FC0;
  cuda::check(cudaMemcpy(problem.k.data() + (200 * 128 + 17) * 2, &nan, 2, cudaMemcpyHostToDevice), "plant a NaN");
  const DeviceArray<float> out(p.queries * p.logits_stride);
  p.logits = out.data();
  launch_indexer_logits_sm90(p);
  const std::vector<float> got = out.host();
  for (int64_t t = 0; t < p.queries; ++t)
    for (int64_t s = 0; s < p.keys; ++s) ASSERT_EQ(s == 200, std::isnan(got[t * p.logits_stride + s]));
}

TEST_F(IndexerLogits, Refuses) {
  IndexerLogitsParams p;
  p.heads = 65, p.dim = 128;
  const char* why = nullptr;
  EXPECT_FALSE(sm90_supports(p, &why));
  EXPECT_STREQ(why, "the number of heads is not in 1 to 64");
  EXPECT_THROW(launch_indexer_logits_sm90(p), std::runtime_error);
}

}  // namespace
}  // namespace dsa::test
