// The forward kernel of sparse_mla at the size it is measured at: 4096 rows of 128 heads at the end of 131,072 keys.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>

#include "kernels/sparse_mla/params.h"
#include "tests/kernels/cuda/sparse_mla_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {

TEST(SparseMlaLong, ForwardMatchesPlainLoopsOnEvery128thRow) {
  if (!have_device()) GTEST_SKIP() << "no CUDA device";
  constexpr int64_t kRows = 4096, kKeys = 131072, kEvery = 128, kChecked = kRows / kEvery;
  constexpr int kHeads = 128, kEntries = 2048;
  for (Lists kind : {Lists::RANDOM, Lists::SHARED}) {
    std::vector<int32_t> indices, lengths;
    make_lists(kind, kRows, kKeys, kEntries, 31, indices, lengths);
    const DeviceArray<int32_t> indices_d(indices), lengths_d(lengths);
    const DeviceArray<uint16_t> q(kRows * kHeads * 576), kv(kKeys * 576), o(kRows * kHeads * 512);
    const DeviceArray<float> lse(kRows * kHeads);
    fill_normal_bf16(q.data(), q.size(), 32, 0.5f);
    fill_normal_bf16(kv.data(), kv.size(), 33, 1);
    o.fill_bytes(0xFF), lse.fill_bytes(0xFF);
    SparseMlaForwardParams p;
    p.queries = kRows, p.keys = kKeys, p.heads = kHeads, p.k = kEntries, p.scale = 0.1352337788608801f;
    p.q = q.data(), p.q_stride = kHeads * 576, p.kv = kv.data(), p.kv_stride = 576;
    p.indices = indices_d.data(), p.indices_stride = kEntries, p.lengths = lengths_d.data();
    p.o = o.data(), p.lse = lse.data();
    launch_sparse_mla_forward_sm90(p);
    SparseMlaParams few = p;  // rows 127, 255, ...
    few.queries = kChecked;
    few.q = q.data() + (kEvery - 1) * p.q_stride, few.q_stride = kEvery * p.q_stride;
    few.indices = indices_d.data() + (kEvery - 1) * kEntries, few.indices_stride = kEvery * kEntries;
    std::vector<int32_t> few_lengths;
    for (int64_t t = kEvery - 1; t < kRows; t += kEvery) few_lengths.push_back(lengths[t]);
    const DeviceArray<int32_t> few_lengths_d(few_lengths);
    few.lengths = few_lengths_d.data();
    const int64_t n = kChecked * kHeads;
    const DeviceArray<double> want_o(n * 512), want_lse(n);
    reference_sparse_mla(few, {want_o.data(), want_lse.data()});
    const DeviceArray<uint16_t> few_o(n * 512);
    const size_t row = kHeads * 512 * 2;
    cuda::check(cudaMemcpy2D(few_o.data(), row, o.data() + (kEvery - 1) * kHeads * 512, kEvery * row, row, kChecked, cudaMemcpyDeviceToDevice),
                "copy the checked rows");
    const double error = relative_error_bf16(few_o.data(), want_o.data(), n * 512);
    EXPECT_LT(error, 3e-3);
    const auto got = lse.host();
    const auto want = want_lse.host();
    double worst = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float v = got[((i / kHeads + 1) * kEvery - 1) * kHeads + i % kHeads];
      worst = std::max(worst, std::isnan(v) ? INFINITY : std::fabs(v - want[i]));
    }
    EXPECT_LT(worst, 1e-4);
    for (float v : got) ASSERT_TRUE(std::isfinite(v));
    std::printf("4096 x 131072, %-28s o %.2e lse %.1e\n", kind == Lists::RANDOM ? "random" : "shared", error, worst);
  }
}

}  // namespace
}  // namespace dsa::test
