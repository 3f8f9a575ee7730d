// The Hopper kernels of sparse_mla against plain loops in fp64, and what their contract says of odd lists.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>

#include "kernels/quantum.h"
#include "kernels/sparse_mla/params.h"
#include "tests/kernels/cuda/sparse_mla_reference.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {

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

  // Returns the entries that the kernel reported as not counting.
  static uint32_t check_forward(Problem& x, const char* what) {
    SparseMlaForwardParams p;
    x.fill(p);
    const int64_t rows = x.queries * x.heads;
    const DeviceArray<uint16_t> o(rows * 512 + 64);
    const DeviceArray<float> lse(rows + 16);
    const DeviceArray<uint32_t> bad(1);
    bad.fill_bytes(0);
    o.fill_bytes(0xFF), lse.fill_bytes(0xFF);
    p.o = o.data(), p.lse = lse.data(), p.bad_entries = bad.data();
    launch_sparse_mla_forward_sm90(p);
    cuda::check(cudaDeviceSynchronize(), "run sparse_mla forward");
    const DeviceArray<double> want_o(rows * 512), want_lse(rows);
    reference_sparse_mla(p, {want_o.data(), want_lse.data()});
    const double error = relative_error_bf16(o.data(), want_o.data(), rows * 512);
    EXPECT_LT(error, 3e-3) << what;
    const auto got = lse.host();
    const auto want = want_lse.host();
    double worst = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (std::isinf(want[i])) EXPECT_EQ(got[i], want[i]) << what << " row " << i / x.heads;
      else worst = std::max(worst, std::isnan(got[i]) ? INFINITY : std::fabs(got[i] - want[i]));
    }
    EXPECT_LT(worst, 1e-4) << what;
    const auto all = o.host();
    for (int i = 0; i < 64; ++i) EXPECT_EQ(all[rows * 512 + i], 0xFFFF) << what << ": written past the end";
    std::printf("%-44s o %.2e lse %.1e\n", what, error, worst);
    return bad.host()[0];
  }
};

TEST_F(SparseMla, ForwardMatchesPlainLoops) {
  struct Case {
    int64_t t, s;
    int h, k;
    const char* what;
  };
  for (const Case& c : {Case{3, 700, 128, 512, "128 heads"}, Case{150, 1000, 64, 256, "64 heads, more rows than CTAs"},
                        Case{5, 900, 32, 320, "32 heads, odd number of tiles"}, Case{7, 4000, 16, 2048, "16 heads"},
                        Case{300, 64, 8, 64, "8 heads, first rows see few keys"}, Case{9, 5000, 100, 4096, "100 heads, 4096 entries"}}) {
    Problem x(c.t, c.s < c.t ? c.t : c.s, c.h, c.k, 100 + c.h);
    EXPECT_EQ(check_forward(x, c.what), 0u);
  }
}

TEST_F(SparseMla, ForwardIgnoresAndCountsWhatIsNoKey) {
  Problem x(40, 800, 128, 256, 7);
  std::mt19937 random(3);
  uint32_t bad = 0;
  for (int t = 0; t < 40; ++t) {
    int32_t* row = &x.indices[t * 256];
    x.lengths[t] = t == 0 ? 0 : t == 1 ? 1 : t == 2 ? 64 : t == 3 ? 65 : random() % 256;
    for (int i = x.lengths[t]; i < 256; ++i) row[i] = t % 2 ? -1 : 2000000000;  // never read
    if (t == 5) for (int i = 0; i < x.lengths[t]; ++i) row[i] = -1, ++bad;      // no key at all
    if (t == 6) row[x.lengths[t] - 1] = 800, ++bad;                             // just out of range
    if (t == 7) row[0] = -5, ++bad;
    if (t == 8) row[10] = row[9], ++bad;                                        // a key twice counts once
    if (t == 9) row[x.lengths[t] - 1] = 2147483647, ++bad;
  }
  EXPECT_EQ(check_forward(x, "odd lists"), bad);
}

TEST_F(SparseMla, ForwardReadsNothingElse) {  // unlisted keys are NaN
  Problem x(20, 3000, 128, 128, 11);
  std::vector<uint16_t> kv = x.kv.host();
  std::vector<bool> listed(x.keys);
  for (int32_t s : x.indices) if (s >= 0) listed[s] = true;
  for (int64_t s = 0; s < x.keys; ++s)
    if (!listed[s]) for (int c = 0; c < 576; ++c) kv[s * 576 + c] = kPoison;
  cuda::check(cudaMemcpy(x.kv.data(), kv.data(), kv.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
  EXPECT_EQ(check_forward(x, "poisoned neighbours"), 0u);
}

TEST_F(SparseMla, ForwardLargeScoresAndRepeats) {
  Problem x(200, 2000, 128, 512, 13);
  fill_normal_bf16(x.q.data(), x.q.size(), 5, 6);  // scores of hundreds: weights are nearly one-hot
  SparseMlaForwardParams p;
  x.fill(p);
  const int64_t n = 200 * 128;
  const DeviceArray<uint16_t> o(n * 512);
  const DeviceArray<float> lse(n);
  p.o = o.data(), p.lse = lse.data();
  launch_sparse_mla_forward_sm90(p);
  const auto first_o = o.host();
  const auto first_lse = lse.host();
  for (float v : first_lse) ASSERT_TRUE(std::isfinite(v));
  for (int i = 0; i < 50; ++i) {
    o.fill_bytes(0xFF);
    launch_sparse_mla_forward_sm90(p);
    ASSERT_EQ(o.host(), first_o) << "run " << i;
    ASSERT_EQ(lse.host(), first_lse) << "run " << i;
  }
}

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

void check_backward(Problem& x, const char* what, int64_t workspace_rows = 64, int cached_keys = 49152) {
  Backward b(x, workspace_rows, cached_keys);
  const DeviceArray<uint16_t> dkv(x.keys * 576);
  ASSERT_TRUE(b.run(dkv)) << what;
  const int64_t rows = b.rows();
  const DeviceArray<double> want_o(rows * 512), want_lse(rows), want_dq(rows * 576), want_dkv(x.keys * 576), want_p(x.queries * x.k);
  want_dkv.fill_bytes(0), want_p.fill_bytes(0);
  reference_sparse_mla(b.p, {want_o.data(), want_lse.data(), x.d_o.data(), want_dq.data(), want_dkv.data(), want_p.data()});
  const double dq_error = relative_error_bf16(b.dq.data(), want_dq.data(), rows * 576);
  const double dkv_error = relative_error_bf16(dkv.data(), want_dkv.data(), x.keys * 576), p_error = relative_error(b.p_sel.data(), want_p.data(), x.queries * x.k);
  const double dq_angle = cosine_distance_bf16(b.dq.data(), want_dq.data(), rows * 576), dkv_angle = cosine_distance_bf16(dkv.data(), want_dkv.data(), x.keys * 576);
  std::printf("%-44s dq %.2e (%.0e) dkv %.2e (%.0e) p_sel %.1e\n", what, dq_error, dq_angle, dkv_error, dkv_angle, p_error);
  EXPECT_LT(dq_error, 5e-3) << what;
  EXPECT_LT(dkv_error, 5e-3) << what;
  EXPECT_LT(p_error, 1e-3) << what;
  EXPECT_LT(dq_angle, 1e-5) << what;
  EXPECT_LT(dkv_angle, 1e-5) << what;
  const auto p = b.p_sel.host();
  const auto lse = want_lse.host();
  for (int64_t t = 0; t < x.queries; ++t) {
    double sum = 0;
    for (int i = 0; i < x.k; ++i) sum += p[t * x.k + i];
    EXPECT_NEAR(sum, std::isinf(lse[t * x.heads]) ? 0 : 1, 1e-3) << what << " row " << t;
  }
}

TEST_F(SparseMla, BackwardMatchesPlainLoops) {
  struct Case {
    int64_t t, s;
    int h, k;
    int64_t rows;
    const char* what;
  };
  for (const Case& c : {Case{6, 700, 128, 512, 64, "backward, 128 heads"}, Case{150, 1000, 64, 256, 16, "backward, 64 heads, 19 chunks"},
                        Case{5, 900, 32, 320, 1, "backward, 32 heads, chunks of one row"}, Case{7, 4000, 16, 2048, 64, "backward, 16 heads"},
                        Case{300, 64, 8, 64, 100, "backward, 8 heads, first rows see few keys"}, Case{9, 5000, 100, 4096, 6, "backward, 100 heads, 4096 entries"}}) {
    Problem x(c.t, c.s < c.t ? c.t : c.s, c.h, c.k, 200 + c.h, Lists::SHARED);
    check_backward(x, c.what, c.rows);
    check_backward(x, "the same by key", c.rows, /*cached_keys=*/0);
  }
}

TEST_F(SparseMla, BackwardOfOddListsAndPoisonedNeighbours) {
  for (int heads : {128, 16}) {  // 16: four queries share a CTA and the union of their lists
    Problem x(40, 800, heads, 256, 17);
    std::mt19937 random(4);
    for (int t = 0; t < 40; ++t) {
      int32_t* row = &x.indices[t * 256];
      x.lengths[t] = t == 0 ? 0 : t == 1 ? 1 : t == 2 ? 64 : t == 3 ? 65 : random() % 256;
      for (int i = x.lengths[t]; i < 256; ++i) row[i] = t % 2 ? -1 : 2000000000;
      if (t == 5) for (int i = 0; i < x.lengths[t]; ++i) row[i] = -1;
      if (t == 6) row[x.lengths[t] - 1] = 800;
      if (t == 7) row[0] = -5;
      if (t == 8) row[10] = row[9];
      for (int i = 0; i < x.lengths[t]; ++i) if (row[i] % 3 == 0) row[i] = -1;  // every third key is listed by nobody
    }
    std::vector<uint16_t> kv = x.kv.host();
    for (int64_t s = 0; s < x.keys; s += 3) for (int c = 0; c < 576; ++c) kv[s * 576 + c] = kPoison;
    cuda::check(cudaMemcpy(x.kv.data(), kv.data(), kv.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
    check_backward(x, heads == 128 ? "backward, odd lists, poisoned neighbours" : "the same, 16 heads");
    check_backward(x, "the same by key", 7, /*cached_keys=*/0);
  }
}

void check_repeats(int cached_keys, int repeats) {
  Problem x(300, 2000, 128, 512, 19);
  const DeviceArray<uint16_t> dkv(x.keys * 576);
  Backward first(x, 128, cached_keys), other(x, 34, cached_keys);  // other rows at a time are another order of additions
  ASSERT_TRUE(first.run(dkv));
  const float quantum = first.p.quantum;
  const Gradients want = first.host();
  for (int i = 0; i < repeats; ++i) {
    Backward& b = i % 2 ? first : other;
    b.run(quantum, dkv);
    if (i > 20 && i % 10) {  // the sums alone
      ASSERT_EQ(b.dkv_sum.host(), want.dkv_sum) << "run " << i;
      continue;
    }
    const Gradients got = b.host();
    ASSERT_EQ(got.dq, want.dq) << "run " << i;
    ASSERT_EQ(got.p_sel, want.p_sel) << "run " << i;
    ASSERT_EQ(got.dkv_sum, want.dkv_sum) << "run " << i;
    ASSERT_EQ(got.report.most, want.report.most) << "run " << i;
    ASSERT_EQ(got.report.difference, 0u) << "run " << i;
  }
}

TEST_F(SparseMla, BackwardRepeatsBitForBit) { check_repeats(49152, 1000); }
TEST_F(SparseMla, BackwardByKeyRepeatsBitForBit) { check_repeats(/*cached_keys=*/0, 1000); }

// Sums that do not fit are noticed, each way of summing.
void check_noticed(int cached_keys) {
  Problem x(40, 300, 128, 128, 31);
  const DeviceArray<uint16_t> dkv(x.keys * 576);
  Backward b(x, 16, cached_keys);
  ASSERT_TRUE(b.run(dkv));
  const float quantum = b.p.quantum;
  const QuantumReport held = b.report.host()[0];
  EXPECT_EQ(held.difference, 0u);
  EXPECT_LE(held.most, QuantumGuess::kMostQuanta);
  EXPECT_GT(held.most, QuantumGuess::kMostQuanta / 20);
  for (const int finer : {16, 32, 64, 256, 4096, 1 << 20}) {
    const QuantumReport r = b.run(quantum / finer, dkv);
    EXPECT_TRUE(r.difference || r.most > QuantumGuess::kMostQuanta) << finer;
  }
  const std::vector<uint16_t> fine = x.d_o.host();
  for (const uint16_t bad : {0x7FC0, 0x7F80, 0xFF80, 0x6C80}) {  // NaN, both infinities, 2^90
    std::vector<uint16_t> d_o = fine;
    d_o[(7 * 128 + 3) * 512 + 5] = bad;
    cuda::check(cudaMemcpy(x.d_o.data(), d_o.data(), d_o.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
    launch_sparse_mla_delta_sm90(b.p, b.o.data(), b.delta.data());
    const QuantumReport r = b.run(quantum, dkv);
    EXPECT_NE(r.difference, 0u) << std::hex << bad;
    EXPECT_EQ(r.most, ~0u) << std::hex << bad;
    EXPECT_EQ(b.run(dkv), bad == 0x6C80) << std::hex << bad;
  }
}

// One sum of one column: q is zero and a list has one key, so that dkv there is do.
void check_one_field(int cached_keys) {
  Problem x(1, 70, 128, 64, 37);
  x.q.fill_bytes(0);
  const DeviceArray<uint16_t> dkv(x.keys * 576);
  x.indices[0] = 69, x.lengths[0] = 1;
  Backward b(x, 1, cached_keys);
  for (int c = 0; c < 512; c += 7) {
    for (const float value : {983040.f, -983040.f, 1048576.f, -1052672.f, 2097152.f, -2097152.f, 3145728.f, 4177920.f, -4177920.f, 1e9f, -1e38f}) {
      std::vector<uint16_t> d_o(128 * 512, 0);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      d_o[c] = static_cast<uint16_t>(bits >> 16);
      cuda::check(cudaMemcpy(x.d_o.data(), d_o.data(), d_o.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
      launch_sparse_mla_delta_sm90(b.p, b.o.data(), b.delta.data());
      const QuantumReport r = b.run(1, dkv);
      const bool fits = std::fabs(value) <= QuantumGuess::kMostQuanta;
      EXPECT_EQ(r.difference == 0 && r.most <= QuantumGuess::kMostQuanta, fits) << value << " in column " << c;
      if (!fits) continue;
      EXPECT_EQ(r.most, QuantumGuess::kMostQuanta);
      const auto got = dkv.host();
      for (int64_t i = 0; i < x.keys * 576; ++i) ASSERT_EQ(got[i], i == 69 * 576 + c ? d_o[c] : 0) << value << " in column " << c;
    }
  }
}

TEST_F(SparseMla, BackwardNoticesWhatDoesNotFit) { check_noticed(49152); }
TEST_F(SparseMla, BackwardByKeyNoticesWhatDoesNotFit) { check_noticed(/*cached_keys=*/0); }
TEST_F(SparseMla, BackwardNoticesOneSumOutOfRange) { check_one_field(49152); }
TEST_F(SparseMla, BackwardByKeyNoticesOneSumOutOfRange) { check_one_field(/*cached_keys=*/0); }

TEST_F(SparseMla, OffsetsBeyond32Bits) {  // T * H * 512 and T * H * 576 pass 2^31
  const int64_t rows = 34000, tail = 8;
  Problem x(rows, rows, 128, 64, 23);
  const DeviceArray<uint16_t> dkv(x.keys * 576);
  Backward b(x, 1024);
  ASSERT_TRUE(b.run(dkv));
  SparseMlaParams last = b.p;
  last.queries = tail;
  last.q = x.q.data() + (rows - tail) * 128 * 576;
  last.indices += (rows - tail) * 64, last.lengths += rows - tail;
  const int64_t n = tail * 128;
  const DeviceArray<double> o(n * 512), lse(n), dq(n * 576), dkv_want(x.keys * 576), p(tail * 64);
  dkv_want.fill_bytes(0), p.fill_bytes(0);
  reference_sparse_mla(last, {o.data(), lse.data(), x.d_o.data() + (rows - tail) * 128 * 512, dq.data(), dkv_want.data(), p.data()});
  EXPECT_LT(relative_error_bf16(b.o.data() + (rows - tail) * 128 * 512, o.data(), n * 512), 3e-3);
  EXPECT_LT(relative_error_bf16(b.dq.data() + (rows - tail) * 128 * 576, dq.data(), n * 576), 5e-3);
  EXPECT_LT(relative_error(b.p_sel.data() + (rows - tail) * 64, p.data(), tail * 64), 1e-3);
}

TEST_F(SparseMla, ReferenceMatchesFiniteDifferences) {
  Problem x(3, 100, 4, 64, 29);
  SparseMlaParams p;
  x.fill(p);
  p.scale = 0.03f;
  const int64_t n = 12;
  const DeviceArray<double> o(n * 512), lse(n), dq(n * 576), dkv(100 * 576), p_sel(3 * 64);
  std::vector<uint16_t> q = x.q.host(), kv = x.kv.host(), g = x.d_o.host();
  const auto value = [](uint16_t b) {
    const uint32_t u = uint32_t{b} << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  };
  const auto bits = [](float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return static_cast<uint16_t>(u >> 16);
  };
  const auto loss = [&] {
    reference_sparse_mla(p, {o.data(), lse.data()});
    double sum = 0;
    const auto out = o.host();
    for (size_t i = 0; i < out.size(); ++i) sum += out[i] * value(g[i]);
    return sum;
  };
  dkv.fill_bytes(0), p_sel.fill_bytes(0);
  reference_sparse_mla(p, {o.data(), lse.data(), x.d_o.data(), dq.data(), dkv.data(), p_sel.data()});
  const auto dq_got = dq.host(), dkv_got = dkv.host();
  const auto difference = [&](const DeviceArray<uint16_t>& array, std::vector<uint16_t>& host, int64_t i) {
    const uint16_t keep = host[i];
    const float up = value(bits(value(keep) + 0.0625f)), down = value(bits(value(keep) - 0.0625f));
    const auto at = [&](float v) {
      host[i] = bits(v);
      cuda::check(cudaMemcpy(array.data(), host.data(), host.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
      return loss();
    };
    const double slope = (at(up) - at(down)) / (double(up) - down);
    host[i] = keep;
    cuda::check(cudaMemcpy(array.data(), host.data(), host.size() * 2, cudaMemcpyHostToDevice), "copy to the device");
    return slope;
  };
  for (int64_t i : {0, 511, 512, 575, 600, 3000, 6911}) EXPECT_NEAR(difference(x.q, q, i), dq_got[i], 2e-3 + 5e-3 * std::fabs(dq_got[i])) << "q " << i;
  for (int j = 0; j < 6; ++j) {
    const int64_t i = x.indices[j * 10] * 576 + (j * 113) % 576;
    EXPECT_NEAR(difference(x.kv, kv, i), dkv_got[i], 2e-3 + 5e-3 * std::fabs(dkv_got[i])) << "kv " << i;
  }
}

}  // namespace
}  // namespace dsa::test
