// The backward pass of dense causal attention, 192/128: TFLOP/s of 2 * pairs * H * (3 * 192 + 2 * 128), though the two kernels
// multiply 2 * pairs * H * (4 * 192 + 3 * 128). Peer: cuDNN through LibTorch's SDPA, whose dq is not repeatable. Floor: 787
// TFLOP/s (cuBLAS, bf16, 8192^3), measured on an H100 80GB.
#include <cstdio>
#include <string>

#include "kernels/dense_mla/params.h"
#include "tests/bench/bench.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::bench {

using test::DeviceArray;

void run_dense_mla_suite(const Options& options, Report& report) {
  struct Case {
    int64_t tokens;
    int heads;
    double peer;
  };
  for (const Case& c : {Case{8192, 16, 448}, {8192, 128, 471}, {32768, 16, 496}, {32768, 64, 480}, {131072, 8, 0}}) {
    const std::string name = "dense_mla backward, H=" + std::to_string(c.heads) + ", " + std::to_string(c.tokens) + " tokens";
    if (name.find(options.only) == std::string::npos) continue;
    const int64_t n = c.tokens * c.heads;
    const DeviceArray<uint16_t> q(n * 192), k(n * 192), v(n * 128), o(n * 128), d_o(n * 128), dq(n * 192), dk(n * 192), dv(n * 128);
    uint64_t seed = 1;
    for (const DeviceArray<uint16_t>* x : {&q, &k, &v, &o, &d_o}) test::fill_normal_bf16(x->data(), x->size(), seed++);
    std::vector<int32_t> starts(c.tokens, 0), ends;
    for (int64_t t = 0; t < c.tokens; ++t) ends.push_back(static_cast<int32_t>(t + 1));
    const DeviceArray<int32_t> start(starts), end(ends);
    const DeviceArray<float> lse(n);
    test::fill_normal_f32(lse.data(), n, seed, 9, 0.5f);
    const DeviceArray<char> workspace(dense_mla_workspace_bytes(c.tokens, c.heads));
    const auto operand = [&](const DeviceArray<uint16_t>& x, int64_t columns) { return DenseMlaOperand{x.data(), c.heads * columns, columns}; };
    DenseMlaBackwardParams p;
    p.queries = p.keys = c.tokens, p.heads = c.heads, p.scale = 0.0721687836f;
    p.q = operand(q, 192), p.k = operand(k, 192), p.v = operand(v, 128), p.o = operand(o, 128), p.d_o = operand(d_o, 128);
    p.lse = lse.data(), p.start = start.data(), p.end = end.data();
    p.dq = dq.data(), p.dk = dk.data(), p.dv = dv.data();
    p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
    const double pairs = 0.5 * static_cast<double>(c.tokens) * static_cast<double>(c.tokens + 1), flop = 2 * pairs * c.heads * (3 * 192 + 2 * 128);
    const double ms = cold_milliseconds([&] { launch_dense_mla_backward_sm90(p); }, options.quick ? 5 : 11);
    report.add({name, ms, flop / ms * 1e-9, "TFLOP/s", flop / 787e9, c.peer, 0});
  }
}

}  // namespace dsa::bench
