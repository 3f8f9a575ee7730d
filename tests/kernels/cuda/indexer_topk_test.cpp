// Score and select in one call: the same sets as scoring whole rows and sorting them, for any workspace.
#include <gtest/gtest.h>

#include <cstdio>

#include "kernels/indexer_topk/params.h"
#include "tests/kernels/cuda/selection_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {

TEST(IndexerTopK, EqualsScoresThenSort) {
  if (!have_device()) {
    std::puts("no CUDA device");
    GTEST_SKIP();
  }
  const int64_t queries = 515, keys = 12000;
  const int k = 2048;
  for (const IndexerDtype dtype : {IndexerDtype::E4M3, IndexerDtype::BF16}) {
    const DeviceArray<uint8_t> q(queries * 64 * 128 * 2), kk(keys * 128 * 2);
    const DeviceArray<float> w(queries * 64), scale(keys), logits(queries * keys);
    if (dtype == IndexerDtype::E4M3) fill_normal_e4m3(q.data(), queries * 64 * 128, 1), fill_normal_e4m3(kk.data(), keys * 128, 2);
    else fill_normal_bf16(q.data(), queries * 64 * 128, 1), fill_normal_bf16(kk.data(), keys * 128, 2);
    fill_normal_f32(w.data(), w.size(), 3);
    fill_normal_f32(scale.data(), keys, 4, 1.f, 0.1f);
    std::vector<int32_t> starts(queries), ends(queries);
    for (int64_t t = 0; t < queries; ++t) starts[t] = t < 300 ? 0 : 700, ends[t] = static_cast<int32_t>(t % 9 == 8 ? 500 : keys - queries + t + 1);
    const DeviceArray<int32_t> start(starts), end(ends);
    IndexerTopKParams p;
    p.scores.dtype = dtype;
    p.scores.queries = queries, p.scores.keys = keys, p.scores.heads = 64, p.scores.dim = 128;
    p.scores.q = q.data(), p.scores.q_stride = 64 * 128, p.scores.k = kk.data(), p.scores.k_stride = 128;
    p.scores.w = w.data(), p.scores.w_stride = 64, p.scores.k_scale = scale.data();
    p.scores.start = start.data(), p.scores.end = end.data();
    p.k = k;
    const DeviceArray<int32_t> indices(queries * k), lengths(queries), nans(queries);
    p.indices = indices.data(), p.indices_stride = k, p.lengths = lengths.data(), p.nan_counts = nans.data();

    IndexerLogitsParams whole = p.scores;
    whole.logits = logits.data(), whole.logits_stride = keys;
    launch_indexer_logits_sm90(whole);
    const std::vector<float> scores = logits.host();
    const IndexerTopKWorkspace sizes = indexer_topk_workspace_sm90(queries, keys);
    for (const size_t bytes : {sizes.least, (sizes.least + sizes.enough) / 2, sizes.enough}) {
      const DeviceArray<uint8_t> workspace(static_cast<int64_t>(bytes));
      p.workspace = workspace.data(), p.workspace_bytes = bytes;
      indices.fill_bytes(0x77);
      launch_indexer_topk_sm90(p);
      const std::vector<int32_t> got = indices.host(), length = lengths.host();
      for (int64_t t = 0; t < queries; ++t) {
        std::vector<int32_t> want = reference_top_k(&scores[t * keys], starts[t], ends[t], k);
        ASSERT_EQ(length[t], static_cast<int32_t>(want.size())) << t;
        want.resize(k, -1);
        for (int i = 0; i < k; ++i) ASSERT_EQ(got[t * k + i], want[i]) << t << " " << i;
      }
    }
    p.workspace_bytes = sizes.least - 1;
    const char* why = nullptr;
    EXPECT_FALSE(sm90_supports(p, &why));
  }
}

}  // namespace
}  // namespace dsa::test
