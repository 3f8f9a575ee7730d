// The operations on a GPU in bf16, forward and backward, against the same operations on the CPU in fp64 on the same (bf16)
// numbers. Skipped without a GPU.
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/where.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/absorption/absorption.h"
#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/dense_mla/dense_mla.h"
#include "kernels/grouped_mlp/grouped_mlp.h"
#include "kernels/indexer_kl/indexer_kl.h"
#include "kernels/indexer_kl/native.h"
#include "kernels/indexer_logits/indexer_logits.h"
#include "kernels/indexer_topk/indexer_topk.h"
#include "kernels/native.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/router/router.h"
#include "kernels/sparse_mla/sparse_mla.h"
#include "parallel/device.h"
#include "tests/support/dsa_guard.h"
#include "tests/support/tensors.h"

namespace dsa {
namespace {

constexpr double kBf16 = 5e-3;  // relative L2 of a result whose operands and value are rounded to bf16

double relative_l2(const at::Tensor& got, const at::Tensor& expected) {
  const at::Tensor x = got.detach().cpu().to(at::kDouble), y = expected.detach().cpu().to(at::kDouble);
  if (x.sizes() != y.sizes()) return std::numeric_limits<double>::infinity();
  return ((x - y).norm() / y.norm()).item<double>();
}

// The same numbers twice: bf16 on the GPU and fp64 on the CPU.
struct Pair {
  at::Tensor device, host;
  Pair(at::IntArrayRef sizes, uint64_t seed, at::Device gpu, double scale = 1) {
    const at::Tensor rounded = (random_tensor(sizes, seed) * scale).to(at::kBFloat16);
    device = rounded.to(gpu).requires_grad_(true);
    host = rounded.to(at::kDouble).requires_grad_(true);
  }
};

at::Tensor ints(const std::vector<int64_t>& values) {
  at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), out.data_ptr<int64_t>());
  return out;
}

class DeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (visible_gpus() == 0) GTEST_SKIP() << "no CUDA device";
    gpu_ = open_gpu(0, 1);
  }
  at::Device gpu_ = at::kCPU;
};

// Two documents and, as a context rank has them, two stretches of rows of the second far apart.
TEST_F(DeviceTest, DenseAttentionByRuns) {
  std::vector<int64_t> start, end;
  for (int64_t i = 0; i < 130; ++i) start.push_back(0), end.push_back(i + 1);
  for (const auto& [first, rows] : {std::pair<int64_t, int64_t>{130, 70}, {300, 100}})
    for (int64_t i = 0; i < rows; ++i) start.push_back(130), end.push_back(first + i + 1);
  const int64_t T = static_cast<int64_t>(start.size()), S = 420, H = 4;
  const Pair q({T, H, 192}, 1, gpu_), k({S, H, 192}, 2, gpu_), v({S, H, 128}, 3, gpu_), dy({T, H, 128}, 4, gpu_);
  const DenseMlaOutput got = dense_mla(q.device, k.device, v.device, ints(start).to(gpu_), ints(end).to(gpu_), 0.08);
  const DenseMlaOutput expected = dense_mla(q.host, k.host, v.host, ints(start), ints(end), 0.08);
  EXPECT_LT(relative_l2(got.o_THV, expected.o_THV), kBf16);
  EXPECT_LT(relative_distance(got.lse_TH.cpu(), expected.lse_TH), 1e-4);
  got.o_THV.backward(dy.device.detach());
  expected.o_THV.backward(dy.host.detach());
  for (const Pair* x : {&q, &k, &v}) EXPECT_LT(relative_l2(x->device.grad(), x->host.grad()), kBf16);

  // A second run that is given the first one's result has the same gradients.
  const at::Tensor dq = q.device.grad().clone();
  q.device.mutable_grad().reset();
  const DenseMlaOutput known{got.o_THV.detach(), got.lse_TH};
  dense_mla(q.device, k.device, v.device, ints(start).to(gpu_), ints(end).to(gpu_), 0.08, 128, &known).o_THV.backward(dy.device.detach());
  EXPECT_LT(relative_l2(q.device.grad(), dq), 1e-3);
  const auto ran = implementations_that_ran();
  EXPECT_TRUE(std::find(ran.begin(), ran.end(), std::pair<std::string, std::string>("dense_mla", "cuDNN")) != ran.end());
}

// Rows that end anywhere, and rows without a key.
TEST_F(DeviceTest, DenseAttentionOfOddLengths) {
  for (const int64_t T : {3, 63, 64, 65, 127, 128, 129, 1000}) {
    SCOPED_TRACE(T);
    std::vector<int64_t> start, end;
    for (int64_t i = 0; i < T; ++i) start.push_back(i < T / 2 ? 0 : T / 2), end.push_back(i % 50 == 49 ? start.back() : i + 1);
    const Pair q({T, 3, 192}, 1, gpu_), k({T, 3, 192}, 2, gpu_), v({T, 3, 128}, 3, gpu_), dy({T, 3, 128}, 4, gpu_);
    dense_mla(q.device, k.device, v.device, ints(start).to(gpu_), ints(end).to(gpu_), 0.08).o_THV.backward(dy.device.detach());
    dense_mla(q.host, k.host, v.host, ints(start), ints(end), 0.08).o_THV.backward(dy.host.detach());
    for (const Pair* x : {&q, &k, &v}) EXPECT_LT(relative_l2(x->device.grad(), x->host.grad()), kBf16);
  }
}

// As long as sequences are: sums whose order is free differ in some of 25 million elements, as those of cuDNN did.
TEST_F(DeviceTest, DenseAttentionRepeatsBitForBit) {
  constexpr int64_t T = 8192, H = 16;
  const auto random = [&](int64_t width, uint64_t seed) { return random_tensor({T, H, width}, seed).to(at::kBFloat16).to(gpu_); };
  const at::Tensor q = random(192, 1).requires_grad_(true), k = random(192, 2).requires_grad_(true),
                   v = random(128, 3).requires_grad_(true), dy = random(128, 4);
  for (const int64_t document : {T, T / 2}) {
    const at::Tensor row = at::arange(T, at::TensorOptions(at::kLong).device(gpu_)), start = row.div(document, "floor") * document;
    std::vector<at::Tensor> first;
    for (int repeat = 0; repeat < 10; ++repeat) {
      for (const at::Tensor& x : {q, k, v}) x.mutable_grad().reset();
      dense_mla(q, k, v, start, row + 1, 0.08).o_THV.backward(dy);
      if (repeat == 0) first = {q.grad().clone(), k.grad().clone(), v.grad().clone()};
      EXPECT_TRUE(at::equal(q.grad(), first[0])) << "dq, repeat " << repeat;
      EXPECT_TRUE(at::equal(k.grad(), first[1])) << "dk, repeat " << repeat;
      EXPECT_TRUE(at::equal(v.grad(), first[2])) << "dv, repeat " << repeat;
    }
  }
}

// Ascending lists of `k` distinct keys, of which the first lengths[t] count.
struct Lists {
  at::Tensor indices, lengths;
  Lists(int64_t T, int64_t S, int64_t K, uint64_t seed) : indices(at::full({T, K}, -1, at::kInt)), lengths(at::zeros({T}, at::kInt)) {
    std::mt19937_64 random(seed);
    std::vector<int32_t> keys(S);
    std::iota(keys.begin(), keys.end(), 0);
    for (int64_t t = 0; t < T; ++t) {
      const int64_t n = t == 0 ? 0 : t == 1 ? 1 : t % 7 == 0 ? static_cast<int64_t>(random() % K) : K;
      std::shuffle(keys.begin(), keys.end(), random);
      std::sort(keys.begin(), keys.begin() + n);
      std::copy(keys.begin(), keys.begin() + n, indices.data_ptr<int32_t>() + t * K);
      lengths.data_ptr<int32_t>()[t] = static_cast<int32_t>(n);
    }
  }
};

TEST_F(DeviceTest, SparseAttentionAndItsMass) {
  const int64_t T = 150, S = 400, K = 128;
  DSA_GUARD(S, K);
  for (const int64_t H : {16, 128}) {
    const Lists lists(T, S, K, 5);
    const Pair q({T, H, 576}, 6, gpu_), kv({S, 576}, 7, gpu_), dy({T, H, 512}, 8, gpu_);
    at::Tensor mass, expected_mass;
    const auto attend = [&](const Pair& p, const at::Tensor& keys, at::Device device, bool host, at::Tensor& out_mass) {
      return sparse_mla(host ? p.host : p.device, keys, lists.indices.to(device), lists.lengths.to(device), 0.05, 512, 64, false,
                        [&](const at::Tensor& m) { out_mass = m.clone(); });
    };
    const SparseMlaOutput got = attend(q, kv.device, gpu_, false, mass), expected = attend(q, kv.host, at::kCPU, true, expected_mass);
    EXPECT_LT(relative_l2(got.o_THC, expected.o_THC), kBf16);
    EXPECT_LT(relative_distance(got.lse_TH.cpu(), expected.lse_TH), 1e-4);
    got.o_THC.backward(dy.device.detach());
    expected.o_THC.backward(dy.host.detach());
    EXPECT_LT(relative_l2(q.device.grad(), q.host.grad()), kBf16);
    EXPECT_LT(relative_l2(kv.device.grad(), kv.host.grad()), kBf16);
    EXPECT_LT(relative_l2(mass, expected_mass), 1e-3);

    // The same bits again, also after a call of another magnitude moved the guess of the quantum.
    const at::Tensor dq = q.device.grad().clone(), dkv = kv.device.grad().clone();
    for (const double scale : {1e6, 1.0}) {
      q.device.mutable_grad().reset();
      kv.device.mutable_grad().reset();
      attend(q, kv.device, gpu_, false, mass).o_THC.backward(dy.device.detach() * scale);
    }
    EXPECT_TRUE(at::equal(q.device.grad(), dq));
    EXPECT_TRUE(at::equal(kv.device.grad(), dkv));
  }
}

TEST_F(DeviceTest, ScoresAndSelection) {
  const int64_t T = 200, S = 300, J = 16, K = 64;
  DSA_GUARD(S, K);
  const Pair q({T, J, 128}, 9, gpu_), k({S, 128}, 10, gpu_);
  const at::Tensor w = random_tensor({T, J}, 11).to(at::kFloat);
  std::vector<int64_t> start, end;
  for (int64_t t = 0; t < T; ++t) start.push_back(t < 100 ? 0 : 100), end.push_back(t + 101);
  const at::Tensor from = ints(start), to = ints(end);
  const at::Tensor got = indexer_logits(q.device, k.device, w.to(gpu_), from.to(gpu_), to.to(gpu_));
  const at::Tensor expected = indexer_logits(q.host, k.host, w.to(at::kDouble), from, to);
  EXPECT_LT(relative_distance(got.cpu(), expected), 1e-5);
  const TopK one = indexer_topk(q.device, k.device, w.to(gpu_), from.to(gpu_), to.to(gpu_), K, 128, true), two = topk_select(got, K);
  EXPECT_TRUE(at::equal(one.indices_TK, two.indices_TK));
  EXPECT_TRUE(at::equal(one.lengths_T, two.lengths_T));
  const at::Tensor none = one.indices_TK < 0;
  EXPECT_TRUE(at::equal(one.scores_TK.masked_fill(none, 0), got.gather(1, one.indices_TK.clamp_min(0).to(at::kLong)).masked_fill(none, 0)));
  EXPECT_FALSE(two.scores_TK.defined());
  const TopK host = topk_select(got.cpu(), K);
  EXPECT_TRUE(at::equal(one.indices_TK.cpu(), host.indices_TK));
  at::Tensor bad = got.clone();
  bad[3][50] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(topk_select(bad, K), std::invalid_argument);
}

TEST_F(DeviceTest, LossOfTheWarmUp) {
  const int64_t T = 260, H = 8, J = 16, K = 64;
  DSA_GUARD(T, K);
  const Pair q({T, H, 192}, 12, gpu_), k({T, H, 192}, 13, gpu_), v({T, H, 128}, 14, gpu_), qi({T, J, 128}, 15, gpu_), ki({T, 128}, 16, gpu_);
  {  // one rotated key for all heads, as MLA has it
    const c10::NoGradGuard no_grad;
    for (const at::Tensor& x : {k.device, k.host}) x.narrow(2, 128, 64).copy_(x.narrow(2, 128, 64).select(1, 0).clone().unsqueeze(1));
  }
  const at::Tensor w = (random_tensor({T, J}, 17) / 50).to(at::kFloat), weight = at::full({T}, 1.0, at::kFloat);
  weight[5] = 0;
  std::vector<int64_t> start, end;
  for (int64_t t = 0; t < T; ++t) start.push_back(t < 90 ? 0 : 90), end.push_back(t + 1);
  const at::Tensor from = ints(start), to = ints(end);
  const double scale = 0.1, loss_scale = 0.25;
  const DenseMlaOutput attention = dense_mla(q.host, k.host, v.host, from, to, scale);
  const at::Tensor p = attention_mass(q.host, k.host, attention.lse_TH, from, to, scale) / static_cast<double>(H);
  const at::Tensor scores = indexer_logits(qi.host, ki.host, w.to(at::kDouble), from, to);
  const KlRows rows = indexer_kl(scores, p, true);
  const IndexerGradients expected =
      indexer_logits_backward(rows.gradient_TX * (weight.to(at::kDouble) * loss_scale).unsqueeze(1), qi.host, ki.host, w.to(at::kDouble), from, to);

  const native::IndexerInputs inputs{qi.device.detach(), ki.device.detach(), w.to(gpu_)};
  const char* why_not = nullptr;
  ASSERT_TRUE(native::indexer_kl_dense_supports(q.device, inputs, &why_not)) << why_not;
  const native::IndexerLoss got =
      native::indexer_kl_dense(q.device.detach(), k.device.detach(), attention.lse_TH.to(at::kFloat).to(gpu_), scale, inputs,
                               from.to(gpu_), to.to(gpu_), K, weight.to(gpu_), loss_scale, true);
  EXPECT_LT(relative_l2(got.kl_T, rows.rows_T), 1e-3);
  EXPECT_LT(relative_l2(got.entropy_T, rows.entropy_prediction_T), 1e-3);
  EXPECT_LT(relative_l2(got.recall_T, captured_mass(p, topk_select(scores, K))), 1e-3);
  EXPECT_LT(relative_l2(got.gradients.dq_TJD, expected.dq_TJD), kBf16);
  EXPECT_LT(relative_l2(got.gradients.dw_TJ, expected.dw_TJ), kBf16);
  EXPECT_LT(relative_l2(got.gradients.dk_SD, expected.dk_SD), kBf16);
}

TEST_F(DeviceTest, LossOverSelectedKeys) {
  const int64_t T = 150, S = 400, J = 16, K = 64;
  DSA_GUARD(S, K);
  const Lists lists(T, S, K, 18);
  const Pair q({T, J, 128}, 19, gpu_), k({S, 128}, 20, gpu_);
  const at::Tensor w = (random_tensor({T, J}, 21) / 20).to(at::kFloat), weight = at::full({T}, 1.0, at::kFloat);
  at::Tensor p = random_tensor({T, K}, 22).exp().masked_fill(lists.indices < 0, 0);
  p = (p / p.sum(1, true).clamp_min(1e-30)).to(at::kFloat);
  const at::Tensor scores = indexer_logits_selected(q.host, k.host, w.to(at::kDouble), lists.indices);
  const KlRows rows = indexer_kl(scores, p.to(at::kDouble), true);
  const IndexerGradients expected = indexer_logits_selected_backward(rows.gradient_TX * 0.5, q.host, k.host, w.to(at::kDouble), lists.indices);
  const native::IndexerInputs inputs{q.device.detach(), k.device.detach(), w.to(gpu_)};
  TopK selected{lists.indices.to(gpu_), lists.lengths.to(gpu_), {}};
  const char* why_not = nullptr;
  EXPECT_FALSE(native::indexer_kl_sparse_supports(inputs, selected, &why_not));
  selected.scores_TK = scores.to(at::kFloat).to(gpu_);
  EXPECT_TRUE(native::indexer_kl_sparse_supports(inputs, selected, &why_not)) << why_not;
  const native::IndexerLoss got = native::indexer_kl_sparse(p.to(gpu_), selected, inputs, weight.to(gpu_), 0.5, 0);
  EXPECT_LT(relative_l2(got.kl_T, rows.rows_T), 1e-3);
  EXPECT_LT(relative_l2(got.entropy_T, rows.entropy_prediction_T), 1e-3);
  EXPECT_LT(relative_l2(got.gradients.dq_TJD, expected.dq_TJD), kBf16);
  EXPECT_LT(relative_l2(got.gradients.dw_TJ, expected.dw_TJ), kBf16);
  EXPECT_LT(relative_l2(got.gradients.dk_SD, expected.dk_SD), kBf16);
  const at::Tensor infinite = weight.masked_fill(at::arange(T) == 3, std::numeric_limits<float>::infinity());
  const native::IndexerLoss bad = native::indexer_kl_sparse(p.to(gpu_), selected, inputs, infinite.to(gpu_), 0.5, 0);
  EXPECT_TRUE(bad.gradients.dk_SD.isnan().all().item<bool>());
}

TEST_F(DeviceTest, RmsNorm) {
  for (const int64_t D : {1536, 7168, 8192}) {
    const Pair x({300, D}, 23, gpu_), dy({300, D}, 24, gpu_);
    const at::Tensor w = random_tensor({D}, 25);
    const at::Tensor device_w = w.to(at::kFloat).to(gpu_).requires_grad_(true), host_w = w.to(at::kFloat).to(at::kDouble).requires_grad_(true);
    const at::Tensor got = rms_norm(x.device, device_w, 1e-6), expected = rms_norm(x.host, host_w, 1e-6);
    EXPECT_LT(relative_l2(got, expected), kBf16);
    got.backward(dy.device.detach());
    expected.backward(dy.host.detach());
    EXPECT_LT(relative_l2(x.device.grad(), x.host.grad()), kBf16);
    EXPECT_LT(relative_l2(device_w.grad(), host_w.grad()), 1e-5);
  }
  // Rows that are a part of wider ones, as the latent is of [latent | rope].
  const Pair wide({70, 576}, 26, gpu_);
  const at::Tensor w = at::full({512}, 1.5, at::kFloat);
  EXPECT_LT(relative_l2(rms_norm(wide.device.narrow(1, 0, 512), w.to(gpu_), 1e-6), rms_norm(wide.host.narrow(1, 0, 512), w.to(at::kDouble), 1e-6)), kBf16);
}

TEST_F(DeviceTest, RotationOfBothLayouts) {
  for (const RopeLayout layout : {RopeLayout::INTERLEAVED, RopeLayout::HALF}) {
    const Pair x({70, 5, 192}, 40, gpu_), dy({70, 5, 64}, 41, gpu_);
    const at::Tensor positions = at::arange(70) * 1700;
    const RopeTable table = rope_table(positions.to(gpu_), {}, at::kFloat), exact = rope_table(positions, {}, at::kFloat);
    const RopeTable host{exact.cos_TR2.to(at::kDouble), exact.sin_TR2.to(at::kDouble)};
    const at::Tensor got = apply_rope(x.device.narrow(2, 128, 64), table, layout), expected = apply_rope(x.host.narrow(2, 128, 64), host, layout);
    EXPECT_LT(relative_l2(got, expected), kBf16);
    got.backward(dy.device.detach());
    expected.backward(dy.host.detach());
    EXPECT_LT(relative_l2(x.device.grad(), x.host.grad()), kBf16);
    const Pair rows({300, 64}, 42, gpu_);  // no heads
    const at::Tensor many = at::arange(300) * 430;
    const RopeTable last = rope_table(many.to(gpu_), {}, at::kFloat), same = rope_table(many, {}, at::kFloat);
    EXPECT_LT(relative_l2(apply_rope(rows.device, last, layout),
                          apply_rope(rows.host, {same.cos_TR2.to(at::kDouble), same.sin_TR2.to(at::kDouble)}, layout)), kBf16);
  }
}

TEST_F(DeviceTest, AbsorptionOfTheUpProjections) {
  const int64_t T = 130, H = 16;
  const Pair q({T, H, 192}, 43, gpu_), w({H, 256, 512}, 44, gpu_, 0.05), o({T, H, 512}, 45, gpu_), dy({T, H, 576}, 46, gpu_), dv({T, H, 128}, 47, gpu_);
  const at::Tensor positions = at::arange(T) * 900;
  const RopeTable table = rope_table(positions.to(gpu_), {}, at::kFloat), exact = rope_table(positions, {}, at::kFloat);
  const at::Tensor got = absorbed_queries(q.device, w.device.narrow(1, 0, 128), table);
  const at::Tensor expected = absorbed_queries(q.host, w.host.narrow(1, 0, 128), {exact.cos_TR2.to(at::kDouble), exact.sin_TR2.to(at::kDouble)});
  const at::Tensor v = expanded_values(o.device, w.device.narrow(1, 128, 128)), expected_v = expanded_values(o.host, w.host.narrow(1, 128, 128));
  EXPECT_LT(relative_l2(got, expected), kBf16);
  EXPECT_LT(relative_l2(v, expected_v), kBf16);
  got.backward(dy.device.detach());
  v.backward(dv.device.detach());
  expected.backward(dy.host.detach());
  expected_v.backward(dv.host.detach());
  for (const Pair* p : {&q, &w, &o}) EXPECT_LT(relative_l2(p->device.grad(), p->host.grad()), kBf16);
}

TEST_F(DeviceTest, ExpertsOneOfThemIdle) {
  const std::vector<int64_t> rows{37, 0, 120, 3};
  const int64_t M = 160, H = 128, I = 64, E = 4;
  const Pair x({M, H}, 27, gpu_), gate({E, I, H}, 28, gpu_, 0.1), up({E, I, H}, 29, gpu_, 0.1), down({E, H, I}, 30, gpu_, 0.1), dy({M, H}, 31, gpu_);
  const at::Tensor got = grouped_swiglu(x.device, rows, gate.device, up.device, down.device);
  const at::Tensor expected = grouped_swiglu(x.host, rows, gate.host, up.host, down.host);
  EXPECT_LT(relative_l2(got, expected), 2 * kBf16);
  got.backward(dy.device.detach());
  expected.backward(dy.host.detach());
  for (const Pair* p : {&x, &gate, &up, &down}) EXPECT_LT(relative_l2(p->device.grad(), p->host.grad()), 2 * kBf16);
  for (const Pair* p : {&gate, &up, &down}) EXPECT_EQ(p->device.grad()[1].abs().max().item<float>(), 0);
}

TEST_F(DeviceTest, OneNetworkForAllRows) {
  for (const bool in_two_parts : {false, true}) {
    const Pair x({200, 256}, 32, gpu_), gate({512, 256}, 33, gpu_, 0.1), up({512, 256}, 34, gpu_, 0.1);
    const Pair down({256, 512}, 35, gpu_, 0.1), dy({200, 256}, 36, gpu_);
    const at::Tensor got = in_two_parts ? at::linear(swiglu_hidden(x.device, gate.device, up.device), down.device)
                                        : swiglu_mlp(x.device, gate.device, up.device, down.device);
    const at::Tensor expected = swiglu_mlp(x.host, gate.host, up.host, down.host);
    EXPECT_LT(relative_l2(got, expected), 2 * kBf16);
    got.backward(dy.device.detach());
    expected.backward(dy.host.detach());
    for (const Pair* p : {&x, &gate, &up, &down}) EXPECT_LT(relative_l2(p->device.grad(), p->host.grad()), 2 * kBf16);
  }
}

TEST_F(DeviceTest, CrossEntropyOfAVocabularyShard) {
  for (const auto& [N, V] : {std::pair<int64_t, int64_t>{150, 9000}, {4100, 16390}}) {  // one tile; more rows and words than one
    const int64_t M = 64;
    const Pair h({N, M}, 37, gpu_), w({V, M}, 38, gpu_, 0.2);
    at::Tensor target = at::empty({N}, at::kLong);
    for (int64_t i = 0; i < N; ++i) target[i] = i % 11 == 0 ? -100 : 100 + (i * 7919) % (2 * V);
    const VocabShardStatistics got = vocab_shard_statistics(h.device, w.device, target.to(gpu_), 100);
    const VocabShardStatistics expected = vocab_shard_statistics(h.host, w.host, target, 100);
    const at::Tensor lse = expected.max_N + expected.sum_exp_N.log();
    EXPECT_LT(relative_distance((got.max_N + got.sum_exp_N.log()).cpu(), lse), 1e-5) << V;
    EXPECT_LT(relative_distance(got.target_logit_N.cpu(), expected.target_logit_N), 1e-5) << V;
    const at::Tensor weight = (target >= 0).to(at::kDouble);
    const VocabShardGradients a = vocab_shard_gradients(h.device, w.device, target.to(gpu_), 100, lse.to(at::kFloat).to(gpu_),
                                                        weight.to(at::kFloat).to(gpu_));
    const VocabShardGradients b = vocab_shard_gradients(h.host, w.host, target, 100, lse, weight);
    EXPECT_LT(relative_l2(a.dhidden_NH, b.dhidden_NH), kBf16) << V;
    EXPECT_LT(relative_l2(a.dweight_VH, b.dweight_VH), kBf16) << V;
  }
}

// The router runs in fp32 everywhere: the same experts, exactly.
TEST_F(DeviceTest, Router) {
  const at::Tensor logits = random_tensor({300, 64}, 39).to(at::kFloat), bias = (random_tensor({64}, 40) / 10).to(at::kFloat);
  const RouterParameters p{8, 4, 6, 2.5, true};
  const RouterOutput got = route(logits.to(gpu_), bias.to(gpu_), p), expected = route(logits, bias, p);
  EXPECT_GT(got.experts_NK.cpu().eq(expected.experts_NK).to(at::kDouble).mean().item<double>(), 0.999);
  EXPECT_LT(relative_l2(got.weights_NK, expected.weights_NK), 1e-3);
}

}  // namespace
}  // namespace dsa
