// One problem of sparse_mla on the device, and one backward pass over it.
#pragma once

#include <gtest/gtest.h>

#include <cstdio>
#include <vector>

#include "kernels/quantum.h"
#include "kernels/sparse_mla/params.h"
#include "tests/kernels/cuda/sparse_mla_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {

constexpr uint16_t kPoison = 0x7FC0;  // a bf16 NaN

struct Problem {
  int64_t queries, keys;
  int heads, k;
  std::vector<int32_t> indices, lengths;
  DeviceArray<uint16_t> q, kv, d_o;
  DeviceArray<int32_t> indices_d, lengths_d;

  Problem(int64_t t, int64_t s, int h, int k_, uint32_t seed, Lists kind = Lists::RANDOM)
      : queries(t), keys(s), heads(h), k(k_), q(t * h * 576), kv(s * 576), d_o(t * h * 512), indices_d(t * k_), lengths_d(t) {
    fill_normal_bf16(q.data(), q.size(), seed, 1);
    fill_normal_bf16(kv.data(), kv.size(), seed + 1, 1);
    fill_normal_bf16(d_o.data(), d_o.size(), seed + 2, 1);
    make_lists(kind, t, s, k, seed + 3, indices, lengths);
  }
  void fill(SparseMlaParams& p) {
    cuda::check(cudaMemcpy(indices_d.data(), indices.data(), indices.size() * 4, cudaMemcpyHostToDevice), "copy to the device");
    cuda::check(cudaMemcpy(lengths_d.data(), lengths.data(), lengths.size() * 4, cudaMemcpyHostToDevice), "copy to the device");
    p.queries = queries, p.keys = keys, p.heads = heads, p.k = k, p.scale = 0.1352337788608801f;
    p.q = q.data(), p.q_stride = heads * 576, p.kv = kv.data(), p.kv_stride = 576;
    p.indices = indices_d.data(), p.indices_stride = k, p.lengths = lengths_d.data();
  }
};

class SparseMla : public testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) {
      std::puts("no CUDA device");
      GTEST_SKIP();
    }
  }
};

struct Gradients {
  std::vector<uint16_t> dq;
  std::vector<float> p_sel;
  std::vector<uint64_t> dkv_sum;
  QuantumReport report;
};

// Device buffers of one backward pass. Outputs are poisoned before each run.
struct Backward {
  Problem& x;
  SparseMlaBackwardParams p;
  DeviceArray<uint16_t> o, dq;
  DeviceArray<float> lse, delta, p_sel;
  DeviceArray<uint64_t> dkv_sum;
  DeviceArray<QuantumReport> report;
  DeviceArray<char> workspace;

  Backward(Problem& problem, int64_t workspace_rows, int cached_keys = 49152)
      : x(problem), o(rows() * 512), dq(rows() * 576), lse(rows()), delta(rows()), p_sel(x.queries * x.k),
        dkv_sum(sparse_mla_sum_bytes(x.keys) / 8), report(1),
        workspace((x.fill(p), p.cached_keys = cached_keys, static_cast<int64_t>(sparse_mla_workspace_bytes(p, workspace_rows)))) {
    SparseMlaForwardParams f;
    static_cast<SparseMlaParams&>(f) = p;
    f.o = o.data(), f.lse = lse.data();
    launch_sparse_mla_forward_sm90(f);
    p.d_o = x.d_o.data(), p.d_o_stride = x.heads * 512;
    p.lse = lse.data(), p.delta = delta.data();
    p.dq = dq.data(), p.p_sel = p_sel.data(), p.dkv_sum = dkv_sum.data();
    p.workspace = workspace.data(), p.workspace_bytes = workspace.size();
    launch_sparse_mla_delta_sm90(p, o.data(), delta.data());
  }
  int64_t rows() const { return x.queries * x.heads; }

  QuantumReport run(float quantum, const DeviceArray<uint16_t>& dkv) {
    dq.fill_bytes(0xFF), p_sel.fill_bytes(0xFF), workspace.fill_bytes(0xFF), dkv.fill_bytes(0xFF), report.fill_bytes(0xFF);
    dkv_sum.fill_bytes(0);
    p.quantum = quantum;
    launch_sparse_mla_backward_sm90(p);
    return finish(dkv);
  }
  QuantumReport finish(const DeviceArray<uint16_t>& dkv) {
    launch_sparse_mla_finish_sm90(dkv_sum.data(), x.keys, p.quantum, dkv.data(), true, report.data(), nullptr);
    cuda::check(cudaDeviceSynchronize(), "run sparse_mla backward");
    return report.host()[0];
  }
  // Leaves the gradients and the quantum behind.
  bool run(const DeviceArray<uint16_t>& dkv) {
    return QuantumGuess().run([&](float quantum) { return run(quantum, dkv); });
  }
  Gradients host() const { return {dq.host(), p_sel.host(), dkv_sum.host(), report.host()[0]}; }
};

}  // namespace dsa::test
