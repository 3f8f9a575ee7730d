// The backward kernels at their working size: 4096 rows of 131,072 keys. dq and p_sel of sampled rows and dkv of sampled keys
// against fp64 loops, p_sel summed over every row, and the same bits whatever the number of rows at a time.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <random>

#include "kernels/quantum.h"
#include "kernels/sparse_mla/params.h"
#include "tests/kernels/cuda/sparse_mla_backward_reference.h"
#include "tests/kernels/cuda/sparse_mla_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {

constexpr int64_t kRows = 4096, kKeys = 131072;
constexpr int kListed = 2048, kSamples = 96;

void check_long(int heads, Lists kind, const char* what) {
  const int64_t th = kRows * heads;
  std::vector<int32_t> indices, lengths;
  make_lists(kind, kRows, kKeys, kListed, 41, indices, lengths);
  const DeviceArray<int32_t> indices_d(indices), lengths_d(lengths);
  const DeviceArray<uint16_t> q(th * 576), kv(kKeys * 576), d_o(th * 512), o(th * 512), dq(th * 576), dkv(kKeys * 576);
  const DeviceArray<float> lse(th), delta(th), p_sel(kRows * kListed);
  const DeviceArray<uint64_t> dkv_sum(sparse_mla_sum_bytes(kKeys) / 8);
  const DeviceArray<QuantumReport> report(1);
  fill_normal_bf16(q.data(), q.size(), 42, 1);
  fill_normal_bf16(kv.data(), kv.size(), 43, 1);
  fill_normal_bf16(d_o.data(), d_o.size(), 44, 1);

  SparseMlaBackwardParams b;
  b.queries = kRows, b.keys = kKeys, b.heads = heads, b.k = kListed, b.scale = 0.1352337788608801f;
  b.q = q.data(), b.q_stride = heads * 576, b.kv = kv.data(), b.kv_stride = 576;
  b.indices = indices_d.data(), b.indices_stride = kListed, b.lengths = lengths_d.data();
  SparseMlaForwardParams f;
  static_cast<SparseMlaParams&>(f) = b;
  f.o = o.data(), f.lse = lse.data();
  launch_sparse_mla_forward_sm90(f);
  b.d_o = d_o.data(), b.d_o_stride = heads * 512, b.lse = lse.data(), b.delta = delta.data();
  b.dq = dq.data(), b.p_sel = p_sel.data(), b.dkv_sum = dkv_sum.data();
  launch_sparse_mla_delta_sm90(b, o.data(), delta.data());
  const DeviceArray<char> workspace(sparse_mla_workspace_bytes(b, 512));
  b.workspace = workspace.data();
  const auto run = [&](float quantum, int64_t rows) {
    dq.fill_bytes(0xFF), p_sel.fill_bytes(0xFF), workspace.fill_bytes(0xFF), dkv.fill_bytes(0xFF);
    dkv_sum.fill_bytes(0);
    b.quantum = quantum, b.workspace_bytes = sparse_mla_workspace_bytes(b, rows);
    launch_sparse_mla_backward_sm90(b);
    launch_sparse_mla_finish_sm90(dkv_sum.data(), kKeys, quantum, dkv.data(), true, report.data(), nullptr);
    return report.host()[0];
  };
  ASSERT_TRUE(QuantumGuess().run([&](float quantum) { return run(quantum, 512); })) << what;
  const float quantum = b.quantum;

  double dq_error = 0, dq_angle = 0, p_error = 0;
  const int64_t some = 4;
  for (int64_t t : {int64_t{0}, kRows / 2 + 1, kRows - some}) {
    SparseMlaParams part = b;
    part.queries = some;
    part.q = q.data() + t * heads * 576, part.indices += t * kListed, part.lengths += t;
    const int64_t n = some * heads;
    const DeviceArray<double> want_o(n * 512), want_lse(n), want_dq(n * 576), want_dkv(kKeys * 576), want_p(some * kListed);
    want_p.fill_bytes(0);
    reference_sparse_mla(part, {want_o.data(), want_lse.data(), d_o.data() + t * heads * 512, want_dq.data(), want_dkv.data(), want_p.data()});
    dq_error = std::max(dq_error, relative_error_bf16(dq.data() + t * heads * 576, want_dq.data(), n * 576));
    dq_angle = std::max(dq_angle, cosine_distance_bf16(dq.data() + t * heads * 576, want_dq.data(), n * 576));
    p_error = std::max(p_error, relative_error(p_sel.data() + t * kListed, want_p.data(), some * kListed));
  }
  const auto weights = p_sel.host();
  double worst_sum = 0;
  for (int64_t t = 0; t < kRows; ++t) {
    double sum = 0;
    for (int i = 0; i < kListed; ++i) sum += weights[t * kListed + i];
    worst_sum = std::max(worst_sum, std::isfinite(sum) ? std::fabs(sum - 1) : INFINITY);
  }

  std::mt19937 random(45);
  std::vector<int32_t> keys, sample_of(kKeys, -1);
  while (keys.size() < kSamples) {
    const int32_t key = indices[random() % indices.size()];
    if (key >= 0 && sample_of[key] < 0) sample_of[key] = static_cast<int32_t>(keys.size()), keys.push_back(key);
  }
  std::vector<ListedPair> pairs;
  for (int64_t t = 0; t < kRows; ++t)
    for (int i = 0; i < lengths[t]; ++i)
      if (const int32_t key = indices[t * kListed + i]; sample_of[key] >= 0) pairs.push_back({static_cast<int32_t>(t), key, sample_of[key]});
  const DeviceArray<double> want(kSamples * 576);
  want.fill_bytes(0);
  reference_dkv_of_pairs(b, pairs, want.data());
  const DeviceArray<uint16_t> got(kSamples * 576);
  for (int i = 0; i < kSamples; ++i)
    cuda::check(cudaMemcpy(got.data() + i * 576, dkv.data() + int64_t{keys[i]} * 576, 1152, cudaMemcpyDeviceToDevice), "copy on the device");
  const double dkv_error = relative_error_bf16(got.data(), want.data(), kSamples * 576);
  const double dkv_angle = cosine_distance_bf16(got.data(), want.data(), kSamples * 576);
  std::printf("%-34s dq %.2e (%.0e) dkv %.2e (%.0e, %zu pairs) p_sel %.1e, rows %.1e\n", what, dq_error, dq_angle, dkv_error, dkv_angle,
              pairs.size(), p_error, worst_sum);
  EXPECT_LT(dq_error, 5e-3) << what;
  EXPECT_LT(dkv_error, 5e-3) << what;
  EXPECT_LT(dq_angle, 1e-5) << what;
  EXPECT_LT(dkv_angle, 1e-5) << what;
  EXPECT_LT(p_error, 1e-3) << what;
  EXPECT_LT(worst_sum, 1e-3) << what;

  const DeviceArray<uint16_t> first_dq(dq.size());
  const DeviceArray<uint64_t> first_sum(dkv_sum.size());
  const DeviceArray<float> first_p(p_sel.size());
  const auto copy = [](const auto& to, const auto& from) {
    cuda::check(cudaMemcpy(to.data(), from.data(), from.size() * sizeof(*from.data()), cudaMemcpyDeviceToDevice), "copy on the device");
  };
  copy(first_dq, dq), copy(first_sum, dkv_sum), copy(first_p, p_sel);
  for (int64_t rows : {512, 200, 511}) {
    run(quantum, rows);
    EXPECT_EQ(differing_words(dkv_sum.data(), first_sum.data(), 2 * dkv_sum.size()), 0) << what << ", " << rows << " rows at a time";
    EXPECT_EQ(differing_words(dq.data(), first_dq.data(), dq.size() / 2), 0) << what << ", " << rows << " rows at a time";
    EXPECT_EQ(differing_words(p_sel.data(), first_p.data(), p_sel.size()), 0) << what << ", " << rows << " rows at a time";
  }
}

TEST(SparseMlaLong, BackwardMatchesPlainLoopsAndRepeats) {
  if (!have_device()) {
    std::puts("no CUDA device");
    GTEST_SKIP();
  }
  check_long(128, Lists::RANDOM, "4096 x 131072, 128 heads, random");
  check_long(128, Lists::SHARED, "4096 x 131072, 128 heads, shared");
  check_long(16, Lists::RANDOM, "4096 x 131072, 16 heads, random");
  check_long(16, Lists::SHARED, "4096 x 131072, 16 heads, shared");
}

}  // namespace
}  // namespace dsa::test
