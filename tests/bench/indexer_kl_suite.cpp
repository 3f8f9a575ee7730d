// The indexer's loss of the dense warm-up, 128 heads, 64 indexer heads. TFLOP/s of 2 * pairs * 128 * 192 for the target and
// its loss, of that + 8 * pairs * 64 * 128 for the whole: scores, selection (recall), target, loss, all gradients. Peer:
// cuDNN's three kernels called per 4096-row chunk, 4.9 s for 131,072 tokens; goal 2.4 s; both as TFLOP/s of the whole.
// Floors: 787 TFLOP/s (cuBLAS, bf16, 8192^3) and 3.02 TB/s (copy), measured on an H100 80GB.
#include <cmath>
#include <cstdio>
#include <string>

#include "kernels/indexer_kl/dense_params.h"
#include "tests/bench/bench.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::bench {
namespace {

using test::DeviceArray;

constexpr int kHeads = 128;
constexpr int64_t kBlockRows = 4096;  // of 131,072 keys: less than 3 GB

struct Attention {
  std::vector<int32_t> ends;
  DeviceArray<uint16_t> q, k;
  DeviceArray<int32_t> end;
  DeviceArray<float> lse;
  DeviceArray<uint8_t> workspace;

  static std::vector<int32_t> causal_ends(int64_t rows, int64_t keys) {
    std::vector<int32_t> out(rows);
    for (int64_t t = 0; t < rows; ++t) out[t] = static_cast<int32_t>(keys - rows + t + 1);
    return out;
  }
  // Scores of N(0,1): their log-sum-exp over n keys is about log n + 1/2.
  static std::vector<float> usual_lse(const std::vector<int32_t>& ends) {
    std::vector<float> out;
    for (const int32_t n : ends) out.insert(out.end(), kHeads, std::log(static_cast<float>(n)) + 0.5f);
    return out;
  }

  Attention(int64_t rows, int64_t keys)
      : ends(causal_ends(rows, keys)), q(rows * kHeads * 192), k(keys * kHeads * 192), end(ends), lse(usual_lse(ends)),
        workspace(static_cast<int64_t>(dense_kl_workspace_bytes(rows, keys))) {
    test::fill_normal_bf16(q.data(), q.size(), 1);
    test::fill_normal_bf16(k.data(), k.size(), 2);
  }

  AttentionMassParams params() const {
    AttentionMassParams p;
    p.queries = static_cast<int64_t>(ends.size()), p.keys = ends.back(), p.heads = kHeads;
    p.scale = 1 / std::sqrt(192.f);
    p.q = q.data(), p.q_stride = kHeads * 192, p.q_head_stride = 192;
    p.k = k.data(), p.k_stride = kHeads * 192, p.k_head_stride = 192;
    p.k_rope = k.data() + 128, p.k_rope_stride = p.k_stride;
    p.lse = lse.data(), p.lse_stride = kHeads, p.lse_head_stride = 1;
    p.end = end.data();
    p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
    return p;
  }
};

constexpr int kIndexerHeads = 64, kDim = 128, kTopK = 2048;

double causal_pairs(double rows, double keys) { return rows * (keys - rows) + rows * (rows + 1) / 2; }
constexpr double kTargetFlop = 2. * kHeads * 192, kWholeFlop = kTargetFlop + 8. * kIndexerHeads * kDim;

bool wanted(const Options& options, const std::string& name) { return name.find(options.only) != std::string::npos; }

void bench_target(int64_t rows, int64_t keys, const Options& options, Report& report) {
  const std::string name = "dense KL target and loss, " + std::to_string(rows) + " x " + std::to_string(keys);
  if (!wanted(options, name)) return;
  const Attention attention(rows, keys);
  const DeviceArray<float> logits(rows * keys), values(4 * rows), dI(rows * keys);
  test::fill_normal_f32(logits.data(), logits.size(), 3);
  DenseKlRows r;
  r.all_heads = kHeads;
  r.logits = logits.data(), r.logits_stride = keys, r.dI = dI.data(), r.dI_stride = keys;
  r.kl = values.data(), r.entropy_target = r.kl + rows, r.entropy_prediction = r.kl + 2 * rows, r.recall = r.kl + 3 * rows;
  const double ms = cold_milliseconds([&] { launch_dense_kl_sm90(attention.params(), r); }, keys > 32768 ? 3 : 9);
  const double flop = causal_pairs(rows, keys) * kTargetFlop;
  // 900 ms for a whole sequence of 131,072
  report.add({name, ms, flop / ms * 1e-9, "TFLOP/s", flop / 787e9, 0, keys == 131072 ? causal_pairs(keys, keys) * kTargetFlop / 0.9e12 : 0});
}

void bench_whole(int64_t rows, int64_t keys, const Options& options, Report& report) {
  const std::string name = "dense KL, loss and gradients, " + std::to_string(rows) + " x " + std::to_string(keys);
  if (!wanted(options, name)) return;
  const Attention attention(rows, keys);
  const int64_t tj = rows * kIndexerHeads;
  const DeviceArray<uint16_t> q(tj * kDim), k(keys * kDim), dq(tj * kDim);
  const DeviceArray<float> w(tj), dw(tj), dk(keys * kDim), values(4 * rows);
  test::fill_normal_bf16(q.data(), q.size(), 4);
  test::fill_normal_bf16(k.data(), k.size(), 5);
  test::fill_normal_f32(w.data(), w.size(), 6, 0, 0.01f);
  dk.fill_bytes(0);
  IndexerKlDenseParams p;
  p.attention = attention.params();
  p.scores.dtype = IndexerDtype::BF16, p.scores.heads = kIndexerHeads, p.scores.dim = kDim;
  p.scores.q = q.data(), p.scores.q_stride = kIndexerHeads * kDim, p.scores.k = k.data(), p.scores.k_stride = kDim;
  p.scores.w = w.data(), p.scores.w_stride = kIndexerHeads;
  p.gradient.heads = kIndexerHeads, p.gradient.q = q.data(), p.gradient.q_stride = p.scores.q_stride;
  p.gradient.k = k.data(), p.gradient.k_stride = kDim, p.gradient.w = w.data(), p.gradient.w_stride = kIndexerHeads;
  p.gradient.dq = dq.data(), p.gradient.dw = dw.data(), p.gradient.dk = dk.data();
  p.rows.all_heads = kHeads, p.rows.loss_scale = 1.f / rows, p.top_k = kTopK;
  p.rows.kl = values.data(), p.rows.entropy_target = p.rows.kl + rows, p.rows.entropy_prediction = p.rows.kl + 2 * rows;
  p.rows.recall = p.rows.kl + 3 * rows;
  const DeviceArray<uint8_t> workspace(static_cast<int64_t>(indexer_kl_dense_workspace_bytes(p, kBlockRows)));
  p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
  const double ms = cold_milliseconds([&] { launch_indexer_kl_dense_sm90(p); }, 3);
  const double pairs = causal_pairs(rows, keys), flop = pairs * kWholeFlop;
  const bool longest = keys == 131072;
  const double whole = causal_pairs(keys, keys) * kWholeFlop * 1e-12;
  report.add({name, ms, flop / ms * 1e-9, "TFLOP/s", flop / 787e9, longest ? whole / 4.9 : 0, longest ? whole / 2.4 : 0});
  std::printf("  a whole sequence of %ld: %.3f s a layer; workspace %.2f GB\n", static_cast<long>(keys),
              ms * 1e-3 * causal_pairs(keys, keys) / pairs, workspace.size() * 1e-9);
}

}  // namespace

void run_indexer_kl_suite(const Options& options, Report& report) {
  for (const int64_t keys : {4096, 8192, 32768, 131072}) bench_target(4096, keys, options, report);
  bench_whole(kBlockRows, 131072, options, report);
  if (!options.quick) bench_whole(32768, 32768, options, report);
}

}  // namespace dsa::bench
