// The Hopper kernels of sparse_mla against plain loops in fp64, and what their contract says of odd lists: forward.
#include <cmath>
#include <cstring>
#include <random>

#include "tests/kernels/cuda/sparse_mla_problem.h"

namespace dsa::test {
namespace {

// Returns the entries that the kernel reported as not counting.
uint32_t check_forward(Problem& x, const char* what) {
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
TEST_F(SparseMla, OffsetsBeyond32Bits) {  // T * H * 512 and T * H * 576 pass 2^31
  const int64_t rows = 34000, tail = 8;
  Problem x(rows, rows, 128, 64, 23);
  const DeviceArray<uint16_t> dkv(x.keys * 576);
  Backward b(x, 1024);
  ASSERT_TRUE(b.run(dkv));
  SparseMlaParams last = b.p;
  last.queries = tail;
  last.q = x.q.data() + (rows - tail) * 128 * 576;
  last.indices += (rows - tail) * 64, last.lengths += rows - tail;
  const int64_t n = tail * 128;
  const DeviceArray<double> o(n * 512), lse(n), dq(n * 576), dkv_want(x.keys * 576), p(tail * 64);
  dkv_want.fill_bytes(0), p.fill_bytes(0);
  reference_sparse_mla(last, {o.data(), lse.data(), x.d_o.data() + (rows - tail) * 128 * 512, dq.data(), dkv_want.data(), p.data()});
  EXPECT_LT(relative_error_bf16(b.o.data() + (rows - tail) * 128 * 512, o.data(), n * 512), 3e-3);
  EXPECT_LT(relative_error_bf16(b.dq.data() + (rows - tail) * 128 * 576, dq.data(), n * 576), 5e-3);
  EXPECT_LT(relative_error(b.p_sel.data() + (rows - tail) * 64, p.data(), tail * 64), 1e-3);
}

TEST_F(SparseMla, ReferenceMatchesFiniteDifferences) {
  Problem x(3, 100, 4, 64, 29);
  SparseMlaParams p;
  x.fill(p);
  p.scale = 0.03f;
  const int64_t n = 12;
  const DeviceArray<double> o(n * 512), lse(n), dq(n * 576), dkv(100 * 576), p_sel(3 * 64);
  std::vector<uint16_t> q = x.q.host(), kv = x.kv.host(), g = x.d_o.host();
  const auto value = [](uint16_t b) {
    const uint32_t u = uint32_t{b} << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  };
  const auto bits = [](float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return static_cast<uint16_t>(u >> 16);
  };
  const auto loss = [&] {
    reference_sparse_mla(p, {o.data(), lse.data()});
    double sum = 0;
    const auto out = o.host();
    for (size_t i = 0; i < out.size(); ++i) sum += out[i] * value(g[i]);
    return sum;
  };
  dkv.fill_bytes(0), p_sel.fill_bytes(0);
  reference_sparse_mla(p, {o.data(), lse.data(), x.d_o.data(), dq.data(), dkv.data(), p_sel.data()});
  const auto dq_got = dq.host(), dkv_got = dkv.host();
  const auto difference = [&](const DeviceArray<uint16_t>& array, std::vector<uint16_t>& host, int64_t i) {
    const uint16_t keep = host[i];
    const float up = value(bits(value(keep) + 0.0625f)), down = value(bits(value(keep) - 0.0625f));
    const auto at = [&](float v) {
      host[i] = bits(v);
      cuda::check(cudaMemcpy(array.data(), host.data(), host.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
      return loss();
    };
    const double slope = (at(up) - at(down)) / (double(up) - down);
    host[i] = keep;
    cuda::check(cudaMemcpy(array.data(), host.data(), host.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
    return slope;
  };
  for (int64_t i : {0, 511, 512, 575, 600, 3000, 6911}) EXPECT_NEAR(difference(x.q, q, i), dq_got[i], 2e-3 + 5e-3 * std::fabs(dq_got[i])) << "q " << i;
  for (int j = 0; j < 6; ++j) {
    const int64_t i = x.indices[j * 10] * 576 + (j * 113) % 576;
    EXPECT_NEAR(difference(x.kv, kv, i), dkv_got[i], 2e-3 + 5e-3 * std::fabs(dkv_got[i])) << "kv " << i;
  }
}

}  // namespace
}  // namespace dsa::test
