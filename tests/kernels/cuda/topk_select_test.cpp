// The Hopper selection against a sort on the host: exactly the same indices, for random and for adversarial rows.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "kernels/topk_select/params.h"
#include "tests/kernels/cuda/selection_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

class TopKSelect : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) {
      std::puts("no CUDA device");
      GTEST_SKIP();
    }
  }

  // scores [rows][stride] with the given ranges (empty: all columns); skip: floats before the first row (alignment).
  static void expect_equal(const std::vector<float>& scores, int64_t rows, int64_t columns, int64_t stride, int k,
                    const std::vector<int32_t>& starts, const std::vector<int32_t>& ends, const std::string& what,
                    int64_t skip = 0) {
    const DeviceArray<float> logits(scores);
    const DeviceArray<int32_t> start(starts), end(ends), indices(rows * (k + 3)), lengths(rows), nans(rows);
    const DeviceArray<float> selected(rows * (k + 5));
    indices.fill_bytes(0x77), selected.fill_bytes(0x77);
    TopKSelectParams p;
    p.rows = rows, p.columns = columns, p.k = k;
    p.logits = logits.data() + skip, p.logits_stride = stride;
    if (!starts.empty()) p.start = start.data();
    if (!ends.empty()) p.end = end.data();
    p.indices = indices.data(), p.indices_stride = k + 3;
    p.scores = selected.data(), p.scores_stride = k + 5;
    p.lengths = lengths.data(), p.nan_counts = nans.data();
    launch_topk_select_sm90(p);
    const std::vector<float> score = selected.host();
    const std::vector<int32_t> got = indices.host(), length = lengths.host(), nan = nans.host();
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t from = starts.empty() ? 0 : std::max(starts[t], 0), to = ends.empty() ? columns : std::min<int64_t>(ends[t], columns);
      const float* row = &scores[skip + t * stride];
      std::vector<int32_t> want = reference_top_k(row, from, to, k);
      int32_t bad = 0;
      for (int64_t s = from; s < to; ++s) bad += std::isnan(row[s]);
      ASSERT_EQ(nan[t], bad) << what << " row " << t;
      ASSERT_EQ(length[t], static_cast<int32_t>(want.size())) << what << " row " << t << " columns " << columns << " k " << k;
      for (int i = 0; i < length[t]; ++i)
        ASSERT_EQ(score[t * (k + 5) + i], row[want[i]]) << what << " row " << t << " place " << i << " columns " << columns << " k " << k;
      for (int i = k; i < k + 5; ++i)
        ASSERT_EQ(std::bit_cast<uint32_t>(score[t * (k + 5) + i]), 0x77777777u) << what << " row " << t << " written past its end";
      want.resize(k, -1);
      want.resize(k + 3, 0x77777777);
      for (int i = 0; i < k + 3; ++i)
        ASSERT_EQ(got[t * (k + 3) + i], want[i]) << what << " row " << t << " place " << i << " columns " << columns << " k " << k;
    }
  }
};

std::vector<float> random_rows(int64_t n, uint64_t seed) {
  const DeviceArray<float> x(n);
  fill_normal_f32(x.data(), n, seed);
  return x.host();
}

TEST_F(TopKSelect, RandomRows) {
  for (const int k : {64, 512, 1000, 2048, 4096})
    for (const int64_t n : {1, 3, 63, 2047, 2048, 2049, 4097, 8191, 8192, 8193, 9000, 16385, 40000, 131073}) {
      const int64_t stride = n + (n % 3);
      expect_equal(random_rows(8 + 6 * stride, n + k), 6, n, stride, k, {}, {}, "random", n % 4);
    }
  expect_equal(random_rows(2 << 20, 5), 2, 1 << 20, 1 << 20, 2048, {}, {}, "a million");
}

TEST_F(TopKSelect, ThousandRowsWithRanges) {
  const int64_t rows = 1000, columns = 20000;
  std::mt19937 random(3);
  std::vector<int32_t> starts(rows), ends(rows);
  for (int64_t t = 0; t < rows; ++t) {
    starts[t] = t % 3 ? 0 : static_cast<int32_t>(random() % columns) - 5;
    ends[t] = starts[t] + static_cast<int32_t>(random() % columns);
  }
  expect_equal(random_rows(rows * columns, 17), rows, columns, columns, 2048, starts, ends, "ranges");
}

TEST_F(TopKSelect, NarrowRows) {
  for (const int k : {1, 4, 8, 31, 64, 300, 4096})
    for (const int64_t n : {1, 2, 8, 31, 32, 33, 160, 255, 256, 257, 384, 511, 512, 513})
      expect_equal(random_rows(3 + 77 * (n + 2), n + k), 77, n, n + 2, k, {}, {}, "narrow", n % 4);
  const int64_t rows = 5000, columns = 256;
  std::mt19937 random(4);
  std::vector<int32_t> starts(rows), ends(rows);
  for (int64_t t = 0; t < rows; ++t) {
    starts[t] = static_cast<int32_t>(random() % 300) - 20;
    ends[t] = starts[t] + static_cast<int32_t>(random() % 280) - 10;
  }
  expect_equal(random_rows(rows * columns, 18), rows, columns, columns, 8, starts, ends, "narrow ranges");
}

TEST_F(TopKSelect, AdversarialRows) {
  std::mt19937 random(7);
  const auto uniform = [&] { return std::uniform_real_distribution<float>(0, 1)(random); };
  struct Kind {
    const char* name;
    std::function<float(int64_t, int64_t)> value;  // (place, columns)
  };
  const Kind kinds[] = {
      {"all equal", [](int64_t, int64_t) { return 1.5f; }},
      {"all zero, both signs", [&](int64_t, int64_t) { return random() % 2 ? 0.f : -0.f; }},
      {"zero and negative", [&](int64_t, int64_t) { return random() % 50 ? -uniform() : random() % 2 ? 0.f : -0.f; }},
      {"two values", [&](int64_t, int64_t) { return random() % 2 ? 1.f : 2.f; }},
      {"two values, few high", [&](int64_t, int64_t) { return random() % 100 ? 1.f : 2.f; }},
      {"ascending", [](int64_t i, int64_t) { return static_cast<float>(i); }},
      {"descending", [](int64_t i, int64_t) { return -static_cast<float>(i); }},
      {"one exponent", [&](int64_t, int64_t) { return 1 + 1e-6f * std::floor(uniform() * 8); }},
      {"one exponent, fine", [&](int64_t, int64_t) { return 1 + 0.999f * uniform(); }},
      {"narrow band, negative", [&](int64_t, int64_t) { return -3 - 1e-4f * uniform(); }},
      {"denormals", [&](int64_t, int64_t) { return std::ldexp(uniform() - 0.5f, -130); }},
      {"sixteen values", [&](int64_t, int64_t) { return static_cast<float>(random() % 16) - 8; }},
      {"minus infinity and few", [&](int64_t, int64_t) { return random() % 40 ? -kInf : uniform(); }},
      {"all minus infinity", [](int64_t, int64_t) { return -kInf; }},
      {"infinities and extremes", [&](int64_t, int64_t) {
         const float v[] = {kInf, -kInf, 3e38f, -3e38f, 1e-45f, -1e-45f, 0.f, -0.f, 1.f};
         return v[random() % 9];
       }},
      {"outlier scale", [&](int64_t i, int64_t) { return i % 1000 == 0 ? 1e30f * uniform() : uniform(); }},
      {"NaN sprinkled", [&](int64_t, int64_t) { return random() % 37 ? uniform() : NAN; }},
      {"all NaN", [](int64_t, int64_t) { return NAN; }},
      {"high where a sample of every so many would look", [&](int64_t i, int64_t n) {
         return (i / 8) % std::max<int64_t>(1, n / 4096) == 0 ? 10 + uniform() : uniform();
       }},
      {"high in one stretch", [&](int64_t i, int64_t n) { return i > n / 2 && i < n / 2 + 1500 ? 10 + uniform() : uniform(); }},
  };
  for (const Kind& kind : kinds)
    for (const int64_t n : {5, 32, 200, 257, 512, 5000, 8190, 20001, 140000})
      for (const int k : n > 512 ? std::vector{64, 2048, 4096} : std::vector{1, 8, 64}) {
        const int64_t rows = n > 512 ? 2 : 50;
        std::vector<float> scores(rows * n);
        for (int64_t i = 0; i < rows * n; ++i) scores[i] = kind.value(i % n, n);
        expect_equal(scores, rows, n, n, k, {}, {}, kind.name);
      }
}

void expect_equal_repeats(int64_t rows, int repeats) {
  const int64_t columns = 131072, k = 2048;
  const DeviceArray<float> logits(rows * columns);
  fill_normal_f32(logits.data(), logits.size(), 23);
  const DeviceArray<int32_t> indices(rows * k), lengths(rows);
  TopKSelectParams p;
  p.rows = rows, p.columns = columns, p.k = k;
  p.logits = logits.data(), p.logits_stride = columns;
  p.indices = indices.data(), p.indices_stride = k;
  p.lengths = lengths.data();
  std::vector<int32_t> first;
  for (int i = 0; i < repeats; ++i) {
    indices.fill_bytes(0x55);
    launch_topk_select_sm90(p);
    const std::vector<int32_t> got = indices.host();
    if (i == 0) first = got;
    ASSERT_EQ(0, std::memcmp(got.data(), first.data(), got.size() * 4)) << "repeat " << i;
  }
}

TEST_F(TopKSelect, ThousandRepeatsAreEqual) { expect_equal_repeats(64, 1000); }

TEST_F(TopKSelect, FewRepeatsAreEqual) { expect_equal_repeats(5, 3); }  // what a sanitizer has time for

TEST_F(TopKSelect, Refuses) {
  TopKSelectParams p;
  p.rows = 1, p.columns = 10, p.k = 5000;
  const char* why = nullptr;
  EXPECT_FALSE(sm90_supports(p, &why));
  EXPECT_STREQ(why, "k is not in 1 to 4096");
}

}  // namespace
}  // namespace dsa::test
