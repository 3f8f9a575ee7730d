// The indexer's backward pass, 4096 query rows at the end of the sequence, 64 heads. Dense: TFLOP/s of 6 * pairs * 64 * 128
// from a given dI. Over selected keys: milliseconds of loss and gradients at k = 2048, ascending lists; the value is
// launches a second. Floors: 787 TFLOP/s (cuBLAS, bf16, 8192^3), 2.85 TB/s added in the L2 cache (352 bytes a time), measured
// on an H100 80GB.
#include <cstdio>
#include <string>

#include "kernels/indexer_backward/params.h"
#include "kernels/indexer_kl/sparse_params.h"
#include "kernels/quantum.h"
#include "tests/bench/bench.h"
#include "tests/kernels/cuda/sparse_mla_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::bench {
namespace {

using test::DeviceArray;

constexpr int64_t kRows = 4096;
constexpr int kHeads = 64;

bool wanted(const Options& options, const std::string& name) { return name.find(options.only) != std::string::npos; }

void run_dense(const Options& options, Report& report, int64_t keys, double peer) {
  const std::string name = "indexer_backward 4096 x " + std::to_string(keys);
  if (!wanted(options, name)) return;
  std::vector<int32_t> ends;
  double pairs = 0;
  for (int64_t t = 0; t < kRows; ++t) ends.push_back(static_cast<int32_t>(keys - kRows + t + 1)), pairs += ends.back();
  const DeviceArray<int32_t> end(ends);
  const DeviceArray<uint16_t> q(kRows * kHeads * 128), k(keys * 128), dq(kRows * kHeads * 128);
  const DeviceArray<float> w(kRows * kHeads), dw(kRows * kHeads), dk(keys * 128), d(kRows * keys);
  test::fill_normal_bf16(q.data(), q.size(), 1);
  test::fill_normal_bf16(k.data(), k.size(), 2);
  test::fill_normal_f32(d.data(), d.size(), 3, 0, 1e-4f);
  test::fill_normal_f32(w.data(), w.size(), 4, 0, 0.011f);
  dk.fill_bytes(0);
  IndexerBackwardParams p;
  p.queries = kRows, p.keys = keys, p.heads = kHeads;
  p.q = q.data(), p.q_stride = kHeads * 128, p.k = k.data(), p.k_stride = 128, p.w = w.data(), p.w_stride = kHeads;
  p.end = end.data(), p.d_logits = d.data(), p.d_logits_stride = keys;
  p.dq = dq.data(), p.dw = dw.data(), p.dk = dk.data();
  const DeviceArray<char> workspace(static_cast<int64_t>(indexer_backward_workspace_bytes(p)));
  p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
  const double ms = cold_milliseconds([&] { launch_indexer_backward_sm90(p); }, options.quick ? 3 : 7), flop = 6 * pairs * kHeads * 128;
  report.add({name, ms, flop / ms * 1e-9, "TFLOP/s", flop / 787e9, peer, 450});
}

struct Peers {
  double random, local, shared;  // milliseconds
};

void run_sparse(const Options& options, Report& report, int64_t keys, test::Lists lists, const char* pattern, double peer) {
  const int k = 2048;
  const std::string name = "indexer_kl selected 4096 x " + std::to_string(keys) + ", " + pattern;
  if (!wanted(options, name)) return;
  std::vector<int32_t> indices, lengths;
  test::make_lists(lists, kRows, keys, k, 5, indices, lengths);
  double pairs = 0;
  for (const int32_t n : lengths) pairs += n;
  const DeviceArray<int32_t> indices_d(indices), lengths_d(lengths);
  const DeviceArray<uint16_t> q(kRows * kHeads * 128), key(keys * 128), dq(kRows * kHeads * 128), dk(keys * 128);
  const DeviceArray<float> w(kRows * kHeads), dw(kRows * kHeads), scores(kRows * k), kl(kRows),
      p_sel(std::vector<float>(kRows * k, 1.f / k));
  test::fill_normal_bf16(q.data(), q.size(), 1);
  test::fill_normal_bf16(key.data(), key.size(), 2);
  test::fill_normal_f32(w.data(), w.size(), 4, 0, 0.011f);
  test::fill_normal_f32(scores.data(), scores.size(), 6, 0, 1);
  const DeviceArray<uint64_t> dk_sum(indexer_kl_sparse_sum_bytes(keys) / 8);
  const DeviceArray<QuantumReport> quanta(1);
  IndexerKlSparseParams p;
  p.queries = kRows, p.keys = keys, p.heads = kHeads, p.k = k;
  p.q = q.data(), p.q_stride = kHeads * 128, p.key = key.data(), p.k_stride = 128, p.w = w.data(), p.w_stride = kHeads;
  p.indices = indices_d.data(), p.indices_stride = k, p.lengths = lengths_d.data(), p.p_sel = p_sel.data(), p.p_stride = k;
  p.scores = scores.data(), p.scores_stride = k;
  p.kl = kl.data(), p.dq = dq.data(), p.dw = dw.data(), p.dk_sum = dk_sum.data();
  const DeviceArray<char> workspace(static_cast<int64_t>(indexer_kl_sparse_workspace_bytes()));
  p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
  const auto finish = [&] {
    launch_indexer_kl_sparse_finish_sm90(dk_sum.data(), keys, p.quantum, dk.data(), true, quanta.data(), nullptr);
  };
  QuantumGuess().run([&](float quantum) {
    dk_sum.fill_bytes(0);
    p.quantum = quantum;
    launch_indexer_kl_sparse_sm90(p);
    finish();
    return quanta.host()[0];
  });
  dk_sum.fill_bytes(0);
  const int repeats = options.quick ? 5 : 11;
  const double ms = cold_milliseconds([&] { launch_indexer_kl_sparse_sm90(p); }, repeats);
  report.add({name, ms, 1e3 / ms, "1/s", pairs * 352 / 2.85e9, peer > 0 ? 1e3 / peer : 0, 1e3 / 1.4});
  const double end_ms = cold_milliseconds(finish, repeats), bytes = keys * 640.0;
  report.add({name + ", finish", end_ms, bytes / end_ms * 1e-9, "TB/s", bytes / 3.02e9, 0, 0});
}

}  // namespace

void run_indexer_backward_suite(const Options& options, Report& report) {
  run_dense(options, report, 8192, 210);
  run_dense(options, report, 32768, 210);
  run_dense(options, report, 131072, 210);
  const std::pair<int64_t, Peers> tables[] = {{8192, {2.1, 2.1, 2.1}}, {32768, {2.3, 2.3, 2.1}}, {131072, {3.9, 3.9, 2.2}}};
  for (const auto& [keys, peers] : tables) {
    run_sparse(options, report, keys, test::Lists::RANDOM, "random", peers.random);
    run_sparse(options, report, keys, test::Lists::LOCAL, "local", peers.local);
    run_sparse(options, report, keys, test::Lists::SHARED, "shared", peers.shared);
  }
}

}  // namespace dsa::bench
