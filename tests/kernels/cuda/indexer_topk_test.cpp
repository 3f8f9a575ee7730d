// Score and select in one call: the same sets as scoring whole rows and sorting them, for any workspace.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>

#include "kernels/hadamard_quantise/params.h"
#include "kernels/indexer_topk/params.h"
#include "kernels/topk_select/params.h"
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
    const DeviceArray<float> selected(queries * k);
    p.selected_scores = selected.data(), p.selected_scores_stride = k;

    IndexerLogitsParams whole = p.scores;
    whole.logits = logits.data(), whole.logits_stride = keys;
    launch_indexer_logits_sm90(whole);
    const std::vector<float> scores = logits.host();
    const IndexerTopKWorkspace sizes = indexer_topk_workspace_sm90(queries, keys);
    for (const size_t bytes : {sizes.least, (sizes.least + sizes.enough) / 2, sizes.enough}) {
      const DeviceArray<uint8_t> workspace(static_cast<int64_t>(bytes));
      p.workspace = workspace.data(), p.workspace_bytes = bytes;
      indices.fill_bytes(0x77), selected.fill_bytes(0xFF);
      launch_indexer_topk_sm90(p);
      const std::vector<float> selected_score = selected.host();
      const std::vector<int32_t> got = indices.host(), length = lengths.host();
      for (int64_t t = 0; t < queries; ++t) {
        std::vector<int32_t> want = reference_top_k(&scores[t * keys], starts[t], ends[t], k);
        ASSERT_EQ(length[t], static_cast<int32_t>(want.size())) << t;
        want.resize(k, -1);
        for (int i = 0; i < k; ++i) ASSERT_EQ(got[t * k + i], want[i]) << t << " " << i;
        for (int i = 0; i < length[t]; ++i) ASSERT_EQ(selected_score[t * k + i], scores[t * keys + want[i]]) << t << " " << i;
      }
    }
    p.workspace_bytes = sizes.least - 1;
    const char* why = nullptr;
    EXPECT_FALSE(sm90_supports(p, &why));
  }
}

// Scores of more than 2^31 elements: rows at both ends, scored and selected.
TEST(IndexerTopK, OffsetsBeyond32Bits) {
  if (!have_device()) {
    std::puts("no CUDA device");
    GTEST_SKIP();
  }
  const int64_t queries = 2100, keys = 1 << 20;
  const int heads = 4, k = 2048;
  const DeviceArray<uint8_t> q(queries * heads * 128), kk(keys * 128);
  const DeviceArray<float> w(queries * heads), logits(queries * keys);
  fill_normal_e4m3(q.data(), q.size(), 1), fill_normal_e4m3(kk.data(), kk.size(), 2);
  fill_normal_f32(w.data(), w.size(), 3);
  IndexerLogitsParams p;
  p.dtype = IndexerDtype::E4M3;
  p.queries = queries, p.keys = keys, p.heads = heads, p.dim = 128;
  p.q = q.data(), p.q_stride = heads * 128, p.k = kk.data(), p.k_stride = 128, p.w = w.data(), p.w_stride = heads;
  p.logits = logits.data(), p.logits_stride = keys;
  launch_indexer_logits_sm90(p);
  const DeviceArray<int32_t> indices(queries * k), lengths(queries);
  TopKSelectParams select;
  select.rows = queries, select.columns = keys, select.k = k;
  select.logits = logits.data(), select.logits_stride = keys;
  select.indices = indices.data(), select.indices_stride = k, select.lengths = lengths.data();
  launch_topk_select_sm90(select);
  const std::vector<int64_t> rows = {0, 2047, 2048, queries - 1};
  const ReferenceLogits want = reference_logits(p, rows);
  const std::vector<int32_t> selected = indices.host();
  for (size_t i = 0; i < rows.size(); ++i) {
    std::vector<float> row(keys);
    cuda::check(cudaMemcpy(row.data(), logits.data() + rows[i] * keys, keys * 4, cudaMemcpyDeviceToHost), "copy a row");
    double error = 0, size = 0;
    for (int64_t s = 0; s < keys; ++s) {
      const double d = row[s] - want.value[i * keys + s];
      error += d * d, size += want.magnitude[i * keys + s] * want.magnitude[i * keys + s];
    }
    EXPECT_LE(std::sqrt(error / size), 2e-4) << rows[i];
    const std::vector<int32_t> best = reference_top_k(row.data(), 0, keys, k);
    EXPECT_TRUE(std::equal(best.begin(), best.end(), selected.begin() + rows[i] * k)) << rows[i];
  }
}

// How much of the selection e4m3 keeps on random data (reported: what it should be depends on the data).
TEST(IndexerTopK, QuantisedSelectionOverlaps) {
  if (!have_device()) {
    std::puts("no CUDA device");
    GTEST_SKIP();
  }
  const int64_t queries = 64, keys = 32768;
  const int k = 2048;
  const DeviceArray<uint16_t> q(queries * 64 * 128), kk(keys * 128);
  fill_normal_bf16(q.data(), q.size(), 5), fill_normal_bf16(kk.data(), kk.size(), 6);
  const DeviceArray<uint8_t> q8(q.size()), k8(kk.size());
  const DeviceArray<float> q_scale(queries * 64), k_scale(keys), w(queries * 64);
  fill_normal_f32(w.data(), w.size(), 7);
  HadamardQuantiseParams quantise;
  quantise.rows = queries * 64, quantise.x = q.data(), quantise.codes = q8.data(), quantise.scale = q_scale.data();
  launch_hadamard_quantise_sm90(quantise);
  quantise.rows = keys, quantise.x = kk.data(), quantise.codes = k8.data(), quantise.scale = k_scale.data();
  launch_hadamard_quantise_sm90(quantise);
  std::vector<float> folded = w.host();
  const std::vector<float> scales = q_scale.host();
  for (size_t i = 0; i < folded.size(); ++i) folded[i] *= scales[i];
  const DeviceArray<float> w8(folded);
  const DeviceArray<uint8_t> workspace(static_cast<int64_t>(indexer_topk_workspace_sm90(queries, keys).enough));
  const auto select = [&](bool fp8) {
    const DeviceArray<int32_t> indices(queries * k), lengths(queries);
    IndexerTopKParams p;
    p.scores.dtype = fp8 ? IndexerDtype::E4M3 : IndexerDtype::BF16;
    p.scores.queries = queries, p.scores.keys = keys, p.scores.heads = 64, p.scores.dim = 128;
    p.scores.q = fp8 ? static_cast<void*>(q8.data()) : q.data(), p.scores.q_stride = 64 * 128;
    p.scores.k = fp8 ? static_cast<void*>(k8.data()) : kk.data(), p.scores.k_stride = 128;
    p.scores.w = fp8 ? w8.data() : w.data(), p.scores.w_stride = 64;
    if (fp8) p.scores.k_scale = k_scale.data();
    p.k = k, p.indices = indices.data(), p.indices_stride = k, p.lengths = lengths.data();
    p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
    launch_indexer_topk_sm90(p);
    return indices.host();
  };
  const std::vector<int32_t> coarse = select(true), fine = select(false);
  double jaccard = 0;
  for (int64_t t = 0; t < queries; ++t) {
    std::vector<int32_t> both;
    std::set_intersection(coarse.begin() + t * k, coarse.begin() + (t + 1) * k, fine.begin() + t * k, fine.begin() + (t + 1) * k,
                          std::back_inserter(both));
    jaccard += static_cast<double>(both.size()) / (2 * k - both.size()) / queries;
  }
  std::printf("Jaccard of the e4m3 and the bf16 selection, 2048 of 32768, normal data: %.3f\n", jaccard);
  EXPECT_GT(jaccard, 0.3);  // two random sets: 0.03
}

}  // namespace
}  // namespace dsa::test
