// The Hopper kernels of indexer_backward against plain loops in fp64.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>

#include "kernels/indexer_backward/params.h"
#include "tests/kernels/cuda/indexer_backward_reference.h"
#include "tests/kernels/cuda/sparse_mla_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {


struct Problem {
  int64_t queries, keys;
  int heads;
  std::vector<int32_t> start, end;
  int64_t q_stride, d_stride;
  DeviceArray<uint16_t> q, k;
  DeviceArray<float> d, w;
  DeviceArray<int32_t> start_d, end_d;

  // Causal: the last query sees all keys.
  Problem(int64_t t, int64_t s, int h, uint32_t seed, std::vector<int32_t> starts = {}, std::vector<int32_t> ends = {})
      : queries(t), keys(s), heads(h), start(std::move(starts)), end(std::move(ends)), q_stride(h * 128 + 8),
        d_stride((s + 3) / 4 * 4 + 12), q(t * q_stride), k(s * 136), d(t * d_stride), w(t * (h + 1)), start_d(t), end_d(t) {
    if (start.empty()) start.assign(t, 0);
    if (end.empty())
      for (int64_t i = 0; i < t; ++i) end.push_back(static_cast<int32_t>(s - t + i + 1));
    fill_normal_bf16(q.data(), q.size(), seed, 1);
    fill_normal_bf16(k.data(), k.size(), seed + 1, 1);
    fill_normal_f32(w.data(), w.size(), seed + 2, 0, 0.011f);
    fill_normal_f32(d.data(), d.size(), seed + 3, 0, 1e-3f);
    std::vector<float> rows = d.host();  // what lies outside a row's range is poison
    for (int64_t i = 0; i < t; ++i)
      for (int64_t c = 0; c < d_stride; ++c)
        if (c < start[i] || c >= end[i]) rows[i * d_stride + c] = NAN;
    cuda::check(cudaMemcpy(d.data(), rows.data(), rows.size() * 4, cudaMemcpyHostToDevice), "copy to the device");
    cuda::check(cudaMemcpy(start_d.data(), start.data(), t * 4, cudaMemcpyHostToDevice), "copy to the device");
    cuda::check(cudaMemcpy(end_d.data(), end.data(), t * 4, cudaMemcpyHostToDevice), "copy to the device");
  }
  IndexerBackwardParams params() const {
    IndexerBackwardParams p;
    p.queries = queries, p.keys = keys, p.heads = heads;
    p.q = q.data(), p.q_stride = q_stride, p.k = k.data(), p.k_stride = 136;
    p.w = w.data(), p.w_stride = heads + 1, p.start = start_d.data(), p.end = end_d.data();
    p.d_logits = d.data(), p.d_logits_stride = d_stride;
    return p;
  }
};

struct Outputs {
  int64_t rows, keys;
  DeviceArray<uint16_t> dq_bf16;
  DeviceArray<float> dq, dw, dk;
  DeviceArray<char> workspace;

  explicit Outputs(const IndexerBackwardParams& p)
      : rows(p.queries * p.heads), keys(p.keys), dq_bf16(rows * 128 + 64), dq(rows * 128 + 64), dw(rows + 64), dk(p.keys * 128 + 64),
        workspace(static_cast<int64_t>(indexer_backward_workspace_bytes(p))) {}
  void run(IndexerBackwardParams p, bool bf16) {
    workspace.fill_bytes(0xFF), dw.fill_bytes(0xFF), (bf16 ? dq_bf16.fill_bytes(0xFF) : dq.fill_bytes(0xFF));
    p.dq = bf16 ? static_cast<void*>(dq_bf16.data()) : dq.data(), p.dq_bf16 = bf16;
    p.dw = dw.data(), p.dk = dk.data();
    p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
    launch_indexer_backward_sm90(p);
    cuda::check(cudaDeviceSynchronize(), "run indexer_backward");
  }
};

class IndexerBackward : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) {
      std::puts("no CUDA device");
      GTEST_SKIP();
    }
  }

  static void expect_equal(const Problem& x, const char* what) {
    const IndexerBackwardParams p = x.params();
    Outputs got(p);
    const int64_t rows = got.rows, keys = x.keys;
    const DeviceArray<double> dq(rows * 128), dw(rows), dk(keys * 128);
    reference_indexer_backward(p, {dq.data(), dw.data(), dk.data()});
    got.dk.fill_bytes(0);
    got.run(p, false);
    const double dq_error = relative_error(got.dq.data(), dq.data(), rows * 128), dw_error = relative_error(got.dw.data(), dw.data(), rows),
                 dk_error = relative_error(got.dk.data(), dk.data(), keys * 128);
    std::printf("%-44s dq %.1e dw %.1e dk %.1e\n", what, dq_error, dw_error, dk_error);
    EXPECT_LT(dq_error, 2e-3) << what;  // m and m w are rounded to bf16
    EXPECT_LT(dw_error, 2e-3) << what;
    EXPECT_LT(dk_error, 2e-3) << what;
    const auto end_dq = got.dq.host(), end_dw = got.dw.host(), first_dk = got.dk.host();
    for (int i = 0; i < 64; ++i) {
      EXPECT_TRUE(std::isnan(end_dq[rows * 128 + i])) << what << ": written past the end";
      EXPECT_TRUE(std::isnan(end_dw[rows + i])) << what << ": written past the end";
      EXPECT_EQ(first_dk[keys * 128 + i], 0) << what << ": written past the end";
    }
    got.run(p, true);  // dk grows by the same again
    EXPECT_LT(relative_error_bf16(got.dq_bf16.data(), dq.data(), rows * 128), 3e-3) << what;
    const auto second_dk = got.dk.host();
    for (int64_t i = 0; i < keys * 128; ++i) ASSERT_EQ(second_dk[i], 2 * first_dk[i]) << what << " at " << i;
  }
};

TEST_F(IndexerBackward, MatchesPlainLoops) {
  for (const int64_t n : {1, 2, 127, 128, 129}) expect_equal(Problem(n, n, 64, n), ("causal, length " + std::to_string(n)).c_str());
  expect_equal(Problem(37, 300, 8, 1000), "8 heads");
  expect_equal(Problem(50, 700, 24, 1001), "24 heads");
  expect_equal(Problem(40, 4000, 1, 1002), "one head");
  expect_equal(Problem(4097, 4097, 16, 1003), "causal, length 4097, 16 heads");
  expect_equal(Problem(1030, 4097, 64, 1004), "tail of 4097, 64 heads");
  expect_equal(Problem(7, 32769, 64, 1005), "tail of 32769");
}

TEST_F(IndexerBackward, PackedRangesAndRowsWithoutKeys) {
  std::vector<int32_t> start, end;
  int32_t document = 0;
  for (int32_t t = 0; t < 700; ++t) {
    if (t == 3 || t == 130 || t == 131 || t == 500) document = t;
    start.push_back(document);
    end.push_back(t % 50 == 7 ? document : t + 1);  // some rows want nothing
  }
  start[11] = -5, end[699] = 5000;  // clamped
  expect_equal(Problem(700, 700, 32, 2000, start, end), "packed documents");
  std::vector<int32_t> far_start, far_end;  // two groups of rows that share no tile of keys
  for (int32_t t = 0; t < 40; ++t) far_start.push_back(t % 2 ? 5 : 3000), far_end.push_back(t % 2 ? 700 : 3990);
  expect_equal(Problem(40, 4000, 64, 2001, far_start, far_end), "rows far apart");
}

TEST_F(IndexerBackward, NoKeyWanted) {
  const Problem x(5, 300, 64, 3000, std::vector<int32_t>(5, 10), std::vector<int32_t>(5, 10));
  Outputs got(x.params());
  got.dk.fill_bytes(0);
  got.run(x.params(), false);
  const auto dq = got.dq.host();
  for (int64_t i = 0; i < got.rows * 128; ++i) ASSERT_EQ(dq[i], 0);
  for (const float v : got.dk.host()) ASSERT_EQ(v, 0);
}

TEST_F(IndexerBackward, ScoresOfZeroPassNothing) {
  Problem x(20, 400, 64, 3500);
  x.q.fill_bytes(0);  // every q.k is 0: the derivative of the ReLU there is 0
  Outputs got(x.params());
  got.dk.fill_bytes(0);
  got.run(x.params(), false);
  const auto dq = got.dq.host();
  for (int64_t i = 0; i < got.rows * 128; ++i) ASSERT_EQ(dq[i], 0);
}

TEST_F(IndexerBackward, RepeatsBitForBit) {
  const Problem x(515, 3000, 64, 4000);
  Outputs got(x.params());
  got.dk.fill_bytes(0);
  got.run(x.params(), false);
  const auto dq = got.dq.host(), dw = got.dw.host(), dk = got.dk.host();
  for (int i = 0; i < 30; ++i) {
    got.dk.fill_bytes(0);
    got.run(x.params(), false);
    ASSERT_EQ(got.dk.host(), dk) << "run " << i;
    ASSERT_EQ(0, std::memcmp(got.dq.host().data(), dq.data(), got.rows * 512)) << "run " << i;
    ASSERT_EQ(0, std::memcmp(got.dw.host().data(), dw.data(), got.rows * 4)) << "run " << i;
  }
}

TEST_F(IndexerBackward, RefusesWithAReason) {
  const Problem x(2, 16, 8, 5000);
  IndexerBackwardParams p = x.params();
  const char* why = nullptr;
  EXPECT_TRUE(sm90_supports(p, &why));
  p.heads = 65;
  EXPECT_FALSE(sm90_supports(p, &why));
  EXPECT_STREQ(why, "the number of heads is not in 1 to 64");
  p.heads = 8, p.dim = 64;
  EXPECT_THROW(launch_indexer_backward_sm90(p), std::runtime_error);
  p.dim = 128;
  EXPECT_THROW(launch_indexer_backward_sm90(p), std::runtime_error);  // no workspace
}

}  // namespace
}  // namespace dsa::test
