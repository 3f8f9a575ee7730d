// The backward kernels of sparse_mla against plain loops in fp64, the same bits in every run, and what does not fit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "tests/kernels/cuda/sparse_mla_problem.h"

namespace dsa::test {
namespace {

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
  for (int heads : {128, 64, 16}) {  // 16: four queries share a CTA and the union of their lists
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
    std::printf("%d heads\n", heads);
    check_backward(x, "backward, odd lists, poisoned neighbours");
    check_backward(x, "the same by key", 7, /*cached_keys=*/0);
  }
}

// Lists of neighbours with much in common, of keys more than 131,072 apart, or, every seventh, with nothing. One list
// has a key again behind an entry that does not count (for more than 32 heads it counts twice).
TEST_F(SparseMla, BackwardOfListsWithMuchInCommon) {
  for (int heads : {64, 40, 16, 8}) {
    constexpr int kKeys = 140000, kListed = 192, kQueries = 45;
    Problem x(kQueries, kKeys, heads, kListed, 41);
    std::mt19937 random(heads);
    std::vector<int32_t> common, other;
    for (int32_t s = 0; s < kKeys; s += kKeys / 280) (random() % 8 ? common : other).push_back(s + random() % 400);
    for (int t = 0; t < kQueries; ++t) {
      int32_t* row = &x.indices[t * kListed];
      int count = 0;
      for (int32_t s : t % 7 == 3 ? other : common)
        if (count < kListed && random() % 4) row[count++] = s;
      if (t == 12 && heads > 32) row[count - 2] = -1, row[count - 1] = row[5];
      x.lengths[t] = count;
    }
    std::printf("%d heads\n", heads);
    check_backward(x, "backward, lists with much in common", 16);
    check_backward(x, "the same by key", 16, /*cached_keys=*/0);
  }
}

TEST_F(SparseMla, BackwardOfLongUnions) {  // of eight lists, longer than what is put together in shared memory at once
  Problem x(16, 8192, 8, 2048, 43);
  check_backward(x, "backward, 8 heads, long unions");
}

// Of more than 24,576 keys dkv is summed a half of the columns at a time. Eight queries each have one list: pairs of
// groups are taken at once.
TEST_F(SparseMla, BackwardOfManyNamedKeys) {
  for (int heads : {128, 64, 16}) {
    Problem x(128, 30000, heads, 4096, 47 + heads);
    std::vector<bool> named(30000);
    for (int64_t t = 0; t < x.queries; ++t)
      for (int i = 0; i < x.k; ++i) named[x.indices[t * x.k + i] = x.indices[t / 8 * 8 * x.k + i]] = true;
    ASSERT_GT(std::count(named.begin(), named.end(), true), 24576);
    std::printf("%d heads\n", heads);
    check_backward(x, "backward, many named keys", 32);
  }
}

void check_repeats(int heads, int64_t keys, int cached_keys, int repeats) {
  Problem x(300, keys, heads, 512, 19);
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

TEST_F(SparseMla, BackwardRepeatsBitForBit) { check_repeats(128, 2000, 49152, 1000); }
TEST_F(SparseMla, BackwardByKeyRepeatsBitForBit) { check_repeats(128, 2000, /*cached_keys=*/0, 1000); }
// Half of the columns at a time.
TEST_F(SparseMla, BackwardOfManyNamedKeysRepeatsBitForBit) { check_repeats(128, 40000, 49152, 100); }
// Of 1000 keys some pairs of lists have enough in common to be taken at once, others do not.
TEST_F(SparseMla, BackwardOf64HeadsRepeatsBitForBit) { check_repeats(64, 1000, 49152, 300); }
TEST_F(SparseMla, BackwardOf16HeadsRepeatsBitForBit) { check_repeats(16, 2000, 49152, 300); }

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

}  // namespace
}  // namespace dsa::test
