// Sparse attention in latent form: 4096 query rows at the end of the sequence, k = 2048, ascending lists; TFLOP/s of
// 2 * pairs * H * (576 + 512) forward and 2 * pairs * H * (3 * 576 + 2 * 512) backward (with p_sel, without delta).
// Floors: 787 TFLOP/s (cuBLAS, bf16, 8192^3), measured on an H100 80GB.
#include <cstdio>
#include <stdexcept>
#include <string>

#include "kernels/quantum.h"
#include "kernels/sparse_mla/params.h"
#include "tests/bench/bench.h"
#include "tests/kernels/cuda/sparse_mla_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::bench {
namespace {

using test::DeviceArray;

constexpr int64_t kWorkspaceRows = 1024;  // at a time, as the model does; P and dS take 1 MB a row of 128 heads

struct Numbers {
  double peer, goal;  // 0: none
};
struct Case {
  int heads;
  test::Lists lists;
  const char* name;
  int64_t keys;
  Numbers forward, backward;
};

}  // namespace

void run_sparse_mla_suite(const Options& options, Report& report) {
  using test::Lists;
  const int64_t rows = 4096;
  const int k = 2048;
  const Case cases[] = {
      {128, Lists::RANDOM, "random", 8192, {666, 700}, {417, 450}},   {128, Lists::RANDOM, "random", 32768, {628, 660}, {251, 420}},
      {128, Lists::RANDOM, "random", 131072, {547, 575}, {196, 330}}, {128, Lists::LOCAL, "local", 8192, {668, 0}, {413, 0}},
      {128, Lists::LOCAL, "local", 32768, {630, 0}, {304, 0}},        {128, Lists::LOCAL, "local", 131072, {577, 0}, {246, 0}},
      {128, Lists::SHARED, "shared", 8192, {653, 690}, {400, 450}},   {128, Lists::SHARED, "shared", 32768, {609, 670}, {398, 450}},
      {128, Lists::SHARED, "shared", 131072, {640, 670}, {395, 450}}, {16, Lists::RANDOM, "random", 8192, {0, 0}, {107, 160}},
      {16, Lists::SHARED, "shared", 131072, {0, 0}, {97, 120}}};
  for (const Case& c : cases) {
    char what[96];
    std::snprintf(what, sizeof what, "sparse_mla H=%d 4096 x %ld, %s", c.heads, static_cast<long>(c.keys), c.name);
    if (std::string(what).find(options.only) == std::string::npos) continue;
    std::vector<int32_t> indices, lengths;
    test::make_lists(c.lists, rows, c.keys, k, 5, indices, lengths);
    double pairs = 0;
    for (int32_t n : lengths) pairs += n;
    const int64_t th = rows * c.heads;
    const DeviceArray<int32_t> indices_d(indices), lengths_d(lengths);
    const DeviceArray<uint16_t> q(th * 576), kv(c.keys * 576), o(th * 512);
    const DeviceArray<float> lse(th);
    test::fill_normal_bf16(q.data(), q.size(), 1, 0.5f);
    test::fill_normal_bf16(kv.data(), kv.size(), 2, 1);
    SparseMlaForwardParams f;
    f.queries = rows, f.keys = c.keys, f.heads = c.heads, f.k = k, f.scale = 0.1352337788608801f;
    f.q = q.data(), f.q_stride = c.heads * 576, f.kv = kv.data(), f.kv_stride = 576;
    f.indices = indices_d.data(), f.indices_stride = k, f.lengths = lengths_d.data();
    f.o = o.data(), f.lse = lse.data();
    const auto add = [&](const char* pass, double ms, double flop, const Numbers& n) {
      report.add({std::string(what) + ", " + pass, ms, flop / ms * 1e-9, "TFLOP/s", flop / 787e9, n.peer, n.goal});
    };
    const int repeats = options.quick ? 5 : 11;
    add("forward", cold_milliseconds([&] { launch_sparse_mla_forward_sm90(f); }, repeats), 2 * pairs * c.heads * (576 + 512), c.forward);
    const DeviceArray<uint16_t> d_o(th * 512), dq(th * 576), dkv(c.keys * 576);
    const DeviceArray<float> delta(th), p_sel(rows * k);
    const DeviceArray<uint64_t> dkv_sum(sparse_mla_sum_bytes(c.keys) / 8);
    const DeviceArray<QuantumReport> quanta(1);
    test::fill_normal_bf16(d_o.data(), d_o.size(), 3, 1);
    SparseMlaBackwardParams b;
    static_cast<SparseMlaParams&>(b) = f;
    b.d_o = d_o.data(), b.d_o_stride = c.heads * 512;
    b.lse = lse.data(), b.delta = delta.data();
    b.dq = dq.data(), b.p_sel = p_sel.data(), b.dkv_sum = dkv_sum.data();
    const DeviceArray<char> workspace(sparse_mla_workspace_bytes(b, kWorkspaceRows));
    b.workspace = workspace.data(), b.workspace_bytes = workspace.size();
    const double delta_ms = cold_milliseconds([&] { launch_sparse_mla_delta_sm90(b, o.data(), delta.data()); }, repeats);
    const auto finish = [&] {
      launch_sparse_mla_finish_sm90(dkv_sum.data(), c.keys, b.quantum, dkv.data(), true, quanta.data(), nullptr);
    };
    const bool holds = QuantumGuess().run([&](float quantum) {
      dkv_sum.fill_bytes(0);
      b.quantum = quantum;
      launch_sparse_mla_backward_sm90(b);
      finish();
      return quanta.host()[0];
    });
    if (!holds) throw std::runtime_error("no quantum holds the gradients of " + std::string(what));
    const double ms = cold_milliseconds([&] { launch_sparse_mla_backward_sm90(b); }, repeats);
    add("backward", ms, 2 * pairs * c.heads * (3 * 576 + 2 * 512), c.backward);
    const double finish_ms = cold_milliseconds(finish, repeats);
    report.add({std::string(what) + ", delta", delta_ms, 2 * th * 1024.0 / delta_ms * 1e-9, "TB/s", 2 * th * 1024.0 / 3.02e9, 0, 0});
    report.add({std::string(what) + ", finish", finish_ms, c.keys * 2688.0 / finish_ms * 1e-9, "TB/s", c.keys * 2688.0 / 3.02e9, 0, 0});
  }
}

}  // namespace dsa::bench
