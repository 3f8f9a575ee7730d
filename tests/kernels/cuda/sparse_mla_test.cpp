// The Hopper kernels of sparse_mla against plain loops in fp64, and what their contract says of odd lists.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <random>

#include "kernels/sparse_mla/params.h"
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
  DeviceArray<uint16_t> q, kv, d_o;
  DeviceArray<int32_t> indices_d{0}, lengths_d{0};

  Problem(int64_t t, int64_t s, int h, int k_, uint32_t seed, Lists kind = Lists::RANDOM)
      : queries(t), keys(s), heads(h), k(k_), q(t * h * 576), kv(s * 576), d_o(t * h * 512) {
    fill_normal_bf16(q.data(), q.size(), seed, 1);
    fill_normal_bf16(kv.data(), kv.size(), seed + 1, 1);
    fill_normal_bf16(d_o.data(), d_o.size(), seed + 2, 1);
    make_lists(kind, t, s, k, seed + 3, indices, lengths);
  }
  void fill(SparseMlaParams& p) {
    indices_d.~DeviceArray();
    new (&indices_d) DeviceArray<int32_t>(indices);
    lengths_d.~DeviceArray();
    new (&lengths_d) DeviceArray<int32_t>(lengths);
    p.queries = queries, p.keys = keys, p.heads = heads, p.k = k, p.scale = 0.1352337788608801f;
    p.q = q.data(), p.q_stride = heads * 576, p.kv = kv.data(), p.kv_stride = 576;
    p.indices = indices_d.data(), p.indices_stride = k, p.lengths = lengths_d.data();
  }
};

class SparseMla : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) {
      std::puts("no CUDA device");
      GTEST_SKIP();
    }
  }

  // Returns the entries that the kernel reported as not counting.
  static uint32_t check_forward(Problem& x, const char* what) {
    SparseMlaForwardParams p;
    x.fill(p);
    const int64_t rows = x.queries * x.heads;
    const DeviceArray<uint16_t> o(rows * 512 + 64);
    const DeviceArray<float> lse(rows + 16);
    const DeviceArray<uint32_t> bad(1);
    bad.fill_bytes(0);
    o.fill_bytes(0xFF), lse.fill_bytes(0xFF);
    p.o = o.data(), p.lse = lse.data(), p.bad_entries = bad.data();
    launch_sparse_mla_forward_sm90(p);
    cuda::check(cudaDeviceSynchronize(), "run sparse_mla forward");
    const DeviceArray<double> want_o(rows * 512), want_lse(rows);
    reference_sparse_mla(p, {want_o.data(), want_lse.data()});
    const double error = relative_error_bf16(o.data(), want_o.data(), rows * 512);
    EXPECT_LT(error, 3e-3) << what;
    const auto got = lse.host();
    const auto want = want_lse.host();
    double worst = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (std::isinf(want[i])) EXPECT_EQ(got[i], want[i]) << what << " row " << i / x.heads;
      else worst = std::max(worst, std::isnan(got[i]) ? INFINITY : std::fabs(got[i] - want[i]));
    }
    EXPECT_LT(worst, 1e-4) << what;
    const auto all = o.host();
    for (int i = 0; i < 64; ++i) EXPECT_EQ(all[rows * 512 + i], 0xFFFF) << what << ": written past the end";
    std::printf("%-44s o %.2e lse %.1e\n", what, error, worst);
    return bad.host()[0];
  }
};

TEST_F(SparseMla, ForwardMatchesPlainLoops) {
  struct Case {
    int64_t t, s;
    int h, k;
    const char* what;
  };
  for (const Case& c : {Case{3, 700, 128, 512, "128 heads"}, Case{150, 1000, 64, 256, "64 heads, more rows than CTAs"},
                        Case{5, 900, 32, 320, "32 heads, odd number of tiles"}, Case{7, 4000, 16, 2048, "16 heads"},
                        Case{300, 64, 8, 64, "8 heads, first rows see few keys"}, Case{9, 5000, 100, 4096, "100 heads, 4096 entries"}}) {
    Problem x(c.t, c.s < c.t ? c.t : c.s, c.h, c.k, 100 + c.h);
    EXPECT_EQ(check_forward(x, c.what), 0u);
  }
}

TEST_F(SparseMla, ForwardIgnoresAndCountsWhatIsNoKey) {
  Problem x(40, 800, 128, 256, 7);
  std::mt19937 random(3);
  uint32_t bad = 0;
  for (int t = 0; t < 40; ++t) {
    int32_t* row = &x.indices[t * 256];
    x.lengths[t] = t == 0 ? 0 : t == 1 ? 1 : t == 2 ? 64 : t == 3 ? 65 : random() % 256;
    for (int i = x.lengths[t]; i < 256; ++i) row[i] = t % 2 ? -1 : 2000000000;  // never read
    if (t == 5) for (int i = 0; i < x.lengths[t]; ++i) row[i] = -1, ++bad;      // no key at all
    if (t == 6) row[x.lengths[t] - 1] = 800, ++bad;                             // just out of range
    if (t == 7) row[0] = -5, ++bad;
    if (t == 8) row[10] = row[9], ++bad;                                        // a key twice counts once
    if (t == 9) row[x.lengths[t] - 1] = 2147483647, ++bad;
  }
  EXPECT_EQ(check_forward(x, "odd lists"), bad);
}

TEST_F(SparseMla, ForwardReadsNothingElse) {  // unlisted keys are NaN
  Problem x(20, 3000, 128, 128, 11);
  std::vector<uint16_t> kv = x.kv.host();
  std::vector<bool> listed(x.keys);
  for (int32_t s : x.indices) if (s >= 0) listed[s] = true;
  for (int64_t s = 0; s < x.keys; ++s)
    if (!listed[s]) for (int c = 0; c < 576; ++c) kv[s * 576 + c] = kPoison;
  cuda::check(cudaMemcpy(x.kv.data(), kv.data(), kv.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
  EXPECT_EQ(check_forward(x, "poisoned neighbours"), 0u);
}

TEST_F(SparseMla, ForwardLargeScoresAndRepeats) {
  Problem x(200, 2000, 128, 512, 13);
  fill_normal_bf16(x.q.data(), x.q.size(), 5, 6);  // scores of hundreds: weights are nearly one-hot
  SparseMlaForwardParams p;
  x.fill(p);
  const int64_t n = 200 * 128;
  const DeviceArray<uint16_t> o(n * 512);
  const DeviceArray<float> lse(n);
  p.o = o.data(), p.lse = lse.data();
  launch_sparse_mla_forward_sm90(p);
  const auto first_o = o.host();
  const auto first_lse = lse.host();
  for (float v : first_lse) ASSERT_TRUE(std::isfinite(v));
  for (int i = 0; i < 50; ++i) {
    o.fill_bytes(0xFF);
    launch_sparse_mla_forward_sm90(p);
    ASSERT_EQ(o.host(), first_o) << "run " << i;
    ASSERT_EQ(lse.host(), first_lse) << "run " << i;
  }
}

}  // namespace
}  // namespace dsa::test
