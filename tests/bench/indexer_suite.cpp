// The lightning indexer: scores (TFLOP/s of 2 * pairs * heads * 128, pairs inside the causal range), score and select
// (the same count), rotation and quantisation (TB/s of bytes read and written). Tail rows: the last 4096 of a sequence.
// Floors: 1436 TFLOP/s e4m3 and 787 bf16 (cuBLAS, 8192^3), 3.02 TB/s (copy), measured on an H100 80GB.
#include <cstdio>

#include "kernels/hadamard_quantise/params.h"
#include "kernels/indexer_logits/params.h"
#include "kernels/indexer_topk/params.h"
#include "tests/bench/bench.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::bench {
namespace {

using test::DeviceArray;

constexpr int kDim = 128;

struct Inputs {
  DeviceArray<uint8_t> q, k;
  DeviceArray<float> w, k_scale;
  DeviceArray<int32_t> start, end;

  static std::vector<int32_t> causal_ends(int64_t queries, int64_t keys) {
    std::vector<int32_t> ends(queries);
    for (int64_t t = 0; t < queries; ++t) ends[t] = static_cast<int32_t>(keys - queries + t + 1);
    return ends;
  }

  Inputs(IndexerDtype dtype, int64_t queries, int64_t keys, int heads, uint64_t seed)
      : q(queries * heads * kDim * (dtype == IndexerDtype::E4M3 ? 1 : 2)), k(keys * kDim * (dtype == IndexerDtype::E4M3 ? 1 : 2)),
        w(queries * heads), k_scale(keys), start(std::vector<int32_t>(queries, 0)), end(causal_ends(queries, keys)) {
    const auto fill = dtype == IndexerDtype::E4M3 ? [](void* p, int64_t n, uint64_t s) { test::fill_normal_e4m3(p, n, s); }
                                                  : [](void* p, int64_t n, uint64_t s) { test::fill_normal_bf16(p, n, s); };
    fill(q.data(), queries * heads * kDim, seed);
    fill(k.data(), keys * kDim, seed + 1);
    test::fill_normal_f32(w.data(), w.size(), seed + 2);
    test::fill_normal_f32(k_scale.data(), keys, seed + 3, 0.0156f, 0.001f);
  }

  IndexerLogitsParams params(IndexerDtype dtype, int64_t queries, int64_t keys, int heads) const {
    IndexerLogitsParams p;
    p.dtype = dtype;
    p.queries = queries, p.keys = keys, p.heads = heads, p.dim = kDim;
    p.q = q.data(), p.q_stride = heads * kDim, p.k = k.data(), p.k_stride = kDim;
    p.w = w.data(), p.w_stride = heads;
    if (dtype == IndexerDtype::E4M3) p.k_scale = k_scale.data();
    p.start = start.data(), p.end = end.data();
    return p;
  }
};

double causal_pairs(int64_t queries, int64_t keys) {
  return static_cast<double>(queries) * (keys - queries) + queries * (queries + 1.0) / 2;
}

const char* name_of(IndexerDtype d) { return d == IndexerDtype::E4M3 ? "e4m3" : "bf16"; }
double ceiling_of(IndexerDtype d) { return d == IndexerDtype::E4M3 ? 1436 : 787; }

void bench_logits(const Options& options, Report& report) {
  struct Case {
    int64_t keys;
    int heads;
    double peer[2], goal[2];  // e4m3, bf16
  };
  const int64_t queries = 4096;
  for (const IndexerDtype dtype : {IndexerDtype::E4M3, IndexerDtype::BF16})
    for (const Case& c : {Case{8192, 64, {1095, 490}, {1150, 560}}, Case{32768, 64, {1135, 499}, {1190, 560}},
                          Case{131072, 64, {998, 494}, {1050, 560}}, Case{32768, 32, {}, {}}, Case{32768, 8, {}, {}}}) {
      char name[96];
      std::snprintf(name, sizeof name, "indexer_logits %s %d heads, 4096 rows x %ld keys", name_of(dtype), c.heads, static_cast<long>(c.keys));
      if (std::string(name).find(options.only) == std::string::npos) continue;
      const Inputs inputs(dtype, queries, c.keys, c.heads, 100 + c.keys);
      const DeviceArray<float> logits(queries * c.keys);
      IndexerLogitsParams p = inputs.params(dtype, queries, c.keys, c.heads);
      p.logits = logits.data(), p.logits_stride = c.keys;
      const double ms = cold_milliseconds([&] { launch_indexer_logits_sm90(p); }, options.quick ? 7 : 15);
      const double flop = 2 * causal_pairs(queries, c.keys) * c.heads * kDim;
      const int i = dtype == IndexerDtype::BF16;
      report.add({name, ms, flop / ms * 1e-9, "TFLOP/s", flop / ceiling_of(dtype) * 1e-9, c.peer[i], c.goal[i]});
    }
}

void bench_score_and_select(const Options& options, Report& report) {
  const int64_t keys = 131072;
  for (const int64_t queries : {int64_t{4096}, keys})
    for (const IndexerDtype dtype : {IndexerDtype::E4M3, IndexerDtype::BF16}) {
      char name[96];
      std::snprintf(name, sizeof name, "indexer_topk %s 64 heads, %ld rows x %ld keys", name_of(dtype), static_cast<long>(queries), static_cast<long>(keys));
      if (std::string(name).find(options.only) == std::string::npos || (options.quick && queries == keys)) continue;
      const Inputs inputs(dtype, queries, keys, 64, 7);
      IndexerTopKParams p;
      p.scores = inputs.params(dtype, queries, keys, 64);
      p.k = 2048;
      const DeviceArray<int32_t> indices(queries * p.k), lengths(queries), nans(queries);
      p.indices = indices.data(), p.indices_stride = p.k, p.lengths = lengths.data(), p.nan_counts = nans.data();
      const DeviceArray<uint8_t> workspace(static_cast<int64_t>(indexer_topk_workspace_sm90(queries, keys).enough));
      p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
      const double ms = cold_milliseconds([&] { launch_indexer_topk_sm90(p); }, queries == keys ? 3 : 7);
      const double flop = 2 * causal_pairs(queries, keys) * 64 * kDim;
      const bool fp8 = dtype == IndexerDtype::E4M3;
      report.add({name, ms, flop / ms * 1e-9, "TFLOP/s", flop / ceiling_of(dtype) * 1e-9, fp8 ? 830. : 430., fp8 ? 1000. : 520.});
    }
}

void bench_quantise(const Options& options, Report& report) {
  const char* name = "hadamard_quantise bf16 -> e4m3, 131072 x 64 x 128";
  if (std::string(name).find(options.only) == std::string::npos) return;
  const int64_t rows = 131072 * 64;
  const DeviceArray<uint16_t> x(rows * kDim);
  test::fill_normal_bf16(x.data(), x.size(), 9);
  const DeviceArray<uint8_t> codes(rows * kDim);
  const DeviceArray<float> scale(rows);
  HadamardQuantiseParams p;
  p.rows = rows, p.x = x.data(), p.codes = codes.data(), p.scale = scale.data();
  const double ms = cold_milliseconds([&] { launch_hadamard_quantise_sm90(p); }, 11);
  const double bytes = rows * (kDim * 3.0 + 4);
  report.add({name, ms, bytes / ms * 1e-9, "TB/s", bytes / 3.02 * 1e-9, 3.02, 2.4});
}

}  // namespace

void run_indexer_suite(const Options& options, Report& report) {
  bench_logits(options, report);
  bench_quantise(options, report);
  bench_score_and_select(options, report);
}

}  // namespace dsa::bench
