// The indexer: scores, selection, loss and gradients against plain loops, DeepSeek's program and Megatron.
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/fp8_quant/fp8_quant.h"
#include "kernels/hadamard/hadamard.h"
#include "kernels/indexer_kl/indexer_kl.h"
#include "kernels/indexer_logits/indexer_logits.h"
#include "kernels/indexer_topk/indexer_topk.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/rope/rope.h"
#include "tests/support/dsa_guard.h"
#include "tests/support/golden.h"
#include "tests/support/tensors.h"

namespace dsa {
namespace {

struct Inputs {
  int64_t T, S, J, D;
  at::Tensor q = random_tensor({T, J, D}, 1), k = random_tensor({S, D}, 2), w = random_tensor({T, J}, 3);
  // Three documents; the rows are a subset of the stream in mixed order; one row has no keys.
  at::Tensor start = at::zeros({T}, at::kLong), end = at::zeros({T}, at::kLong);
  Inputs(int64_t T, int64_t S, int64_t J, int64_t D) : T(T), S(S), J(J), D(D) {
    for (int64_t t = 0; t < T; ++t) {
      const int64_t position = t * 7 % S, first = position < S / 3 ? 0 : position < S / 2 ? S / 3 : S / 2;
      start[t] = first;
      end[t] = t == 4 ? first : position + 1;
    }
  }
};

at::Tensor plain_scores(const Inputs& x) {
  at::Tensor out = at::full({x.T, x.S}, -INFINITY, at::kDouble);
  auto Q = x.q.accessor<double, 3>();
  auto K = x.k.accessor<double, 2>(), W = x.w.accessor<double, 2>(), I = out.accessor<double, 2>();
  for (int64_t t = 0; t < x.T; ++t)
    for (int64_t s = x.start[t].item<int64_t>(); s < x.end[t].item<int64_t>(); ++s) {
      I[t][s] = 0;
      for (int64_t j = 0; j < x.J; ++j) {
        double dot = 0;
        for (int64_t d = 0; d < x.D; ++d) dot += Q[t][j][d] * K[s][d];
        I[t][s] += W[t][j] * std::max(dot, 0.0);
      }
    }
  return out;
}

TEST(IndexerLogits, PlainLoops) {
  for (const Inputs& x : {Inputs(23, 31, 3, 8), Inputs(40, 1100, 2, 4), Inputs(3, 70, 300, 2)}) {
    const at::Tensor expected = plain_scores(x);
    EXPECT_LE(relative_distance(indexer_logits(x.q, x.k, x.w, x.start, x.end), expected), 1e-13);
    const at::Tensor rough = indexer_logits(x.q.to(at::kBFloat16), x.k.to(at::kBFloat16), x.w.to(at::kFloat), x.start.to(at::kInt), x.end.to(at::kInt));
    EXPECT_EQ(rough.scalar_type(), at::kFloat);
    EXPECT_LE(relative_distance(rough, expected), 3e-2);
  }
}

TEST(IndexerLogits, BackwardIsTheDerivative) {
  const Inputs x(23, 31, 3, 8);
  const at::Tensor dI = random_tensor({x.T, x.S}, 4);
  const auto g = indexer_logits_backward(dI, x.q, x.k, x.w, x.start, x.end);
  const auto value = [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& w) {
    const at::Tensor I = indexer_logits(q, k, w, x.start, x.end);
    return (I * dI).masked_fill(I.isinf(), 0).sum().item<double>();
  };
  const double h = 1e-6;
  for (int direction = 0; direction < 4; ++direction) {
    const at::Tensor vq = random_tensor(x.q.sizes(), 40 + direction), vk = random_tensor(x.k.sizes(), 50 + direction), vw = random_tensor(x.w.sizes(), 60 + direction);
    EXPECT_NEAR((g.dq_TJD * vq).sum().item<double>(), (value(x.q + vq * h, x.k, x.w) - value(x.q - vq * h, x.k, x.w)) / (2 * h), 1e-5);
    EXPECT_NEAR((g.dk_SD * vk).sum().item<double>(), (value(x.q, x.k + vk * h, x.w) - value(x.q, x.k - vk * h, x.w)) / (2 * h), 1e-5);
    EXPECT_NEAR((g.dw_TJ * vw).sum().item<double>(), (value(x.q, x.k, x.w + vw * h) - value(x.q, x.k, x.w - vw * h)) / (2 * h), 1e-5);
  }
}

TEST(IndexerLogits, SelectedFormEqualsDense) {
  const Inputs x(33, 50, 3, 8);
  const int64_t K = 6;
  DSA_GUARD(x.S, K);
  const at::Tensor I = indexer_logits(x.q, x.k, x.w, x.start, x.end);
  const TopK best = topk_select(I, K);
  const at::Tensor index = best.indices_TK.to(at::kLong), missing = index < 0;
  const at::Tensor selected = indexer_logits_selected(x.q, x.k, x.w, best.indices_TK);
  EXPECT_LE(relative_distance(selected, I.gather(1, index.clamp_min(0)).masked_fill(missing, -INFINITY)), 1e-13);
  const at::Tensor dI_TK = random_tensor({x.T, K}, 5);
  const at::Tensor dI = at::zeros({x.T, x.S}, at::kDouble).scatter_add(1, index.clamp_min(0), dI_TK.masked_fill(missing, 0));
  const auto sparse = indexer_logits_selected_backward(dI_TK, x.q, x.k, x.w, best.indices_TK);
  const auto dense = indexer_logits_backward(dI, x.q, x.k, x.w, x.start, x.end);
  EXPECT_LE(relative_distance(sparse.dq_TJD, dense.dq_TJD), 1e-13);
  EXPECT_LE(relative_distance(sparse.dk_SD, dense.dk_SD), 1e-13);
  EXPECT_LE(relative_distance(sparse.dw_TJ, dense.dw_TJ), 1e-13);
}

TEST(IndexerTopk, BlocksEqualWholeSelection) {
  const Inputs x(45, 90, 3, 8);
  const int64_t K = 7;
  DSA_GUARD(x.S, K);
  const TopK whole = topk_select(indexer_logits(x.q, x.k, x.w, x.start, x.end), K);
  const at::Tensor none = whole.indices_TK < 0;
  const at::Tensor scores = indexer_logits_selected(x.q, x.k, x.w, whole.indices_TK).masked_fill(none, 0);
  for (const int64_t block : {1, 4, 128}) {
    const TopK parts = indexer_topk(x.q, x.k, x.w, x.start, x.end, K, block, /*want_scores=*/true);
    EXPECT_TRUE(at::equal(parts.indices_TK, whole.indices_TK));
    EXPECT_TRUE(at::equal(parts.lengths_T, whole.lengths_T));
    EXPECT_LE(relative_distance(parts.scores_TK.masked_fill(none, 0), scores), 1e-13);
    EXPECT_FALSE(indexer_topk(x.q, x.k, x.w, x.start, x.end, K, block).scores_TK.defined());
  }
}

// The total order by a full sort.
std::vector<int32_t> sorted_choice(const at::Tensor& row, int64_t k) {
  std::vector<double> score(row.numel());
  for (size_t s = 0; s < score.size(); ++s) score[s] = row[s].item<double>();
  std::vector<int32_t> order;
  for (size_t s = 0; s < score.size(); ++s)
    if (score[s] != -INFINITY) order.push_back(s);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return score[a] > score[b]; });
  order.resize(std::min<size_t>(order.size(), k));
  std::sort(order.begin(), order.end());
  return order;
}

TEST(TopkSelect, AdversarialRows) {
  const int64_t S = 700;
  std::vector<at::Tensor> rows;
  const at::Tensor ramp = at::arange(S, at::kDouble), noise = random_tensor({S}, 6);
  rows.push_back(at::full({S}, 3.0, at::kDouble));                        // all equal
  rows.push_back((noise > 0).to(at::kDouble));                            // two values
  rows.push_back(ramp);                                                   // ascending
  rows.push_back(-ramp);                                                  // descending
  rows.push_back(noise);
  rows.push_back(1 + noise * 1e-6);                                       // a narrow band
  rows.push_back(noise.sign() * 1e-42 * (ramp % 5));                      // denormals and zeros of both signs
  rows.push_back(at::where(noise > 0, at::full({S}, 0.0, at::kDouble), at::full({S}, -0.0, at::kDouble)));
  rows.push_back(at::full({S}, -INFINITY, at::kDouble));                  // nothing to select
  rows.push_back(at::where(ramp == 5, at::full({S}, -1e30, at::kDouble), at::full({S}, -INFINITY, at::kDouble)));
  rows.push_back(at::where(noise > 1, at::full({S}, static_cast<double>(INFINITY), at::kDouble), noise));
  rows.push_back(at::where(ramp % 3 == 0, noise, at::full({S}, -INFINITY, at::kDouble)));
  for (const auto type : {at::kFloat, at::kDouble}) {
    const at::Tensor scores = at::stack(rows).to(type);
    for (const int64_t k : {1, 2, 64, 233, 234, 699, 700, 900}) {
      const TopK out = topk_select(scores, k);
      ASSERT_EQ(out.indices_TK.size(1), k);
      for (int64_t t = 0; t < scores.size(0); ++t) {
        const auto expected = sorted_choice(scores[t], k);
        ASSERT_EQ(out.lengths_T[t].item<int>(), static_cast<int>(expected.size())) << "row " << t << " k " << k;
        const int32_t* got = out.indices_TK[t].data_ptr<int32_t>();
        for (int64_t i = 0; i < k; ++i)
          ASSERT_EQ(got[i], i < static_cast<int64_t>(expected.size()) ? expected[i] : -1) << "row " << t << " k " << k << " place " << i;
      }
    }
    at::Tensor bad = scores.clone();
    bad[3][400] = NAN;
    bad[7][1] = NAN;
    try {
      topk_select(bad, 5);
      ADD_FAILURE() << "NaN was accepted";
    } catch (const std::invalid_argument& e) {
      EXPECT_NE(std::string(e.what()).find("row 3 "), std::string::npos) << e.what();
    }
  }
}

TEST(IndexerKl, FormulaAndGradient) {
  const int64_t T = 6, X = 9;
  at::Tensor scores = random_tensor({T, X}, 7) * 3, target = at::softmax(random_tensor({T, X}, 8) * 2, 1);
  const at::Tensor off = at::arange(X).unsqueeze(0) > at::arange(T).unsqueeze(1);
  scores.masked_fill_(off, -INFINITY);
  target.masked_fill_(off, 0);
  target[4][2] = 0;  // 0 log 0
  target /= target.sum(1, true);
  scores[5].fill_(-INFINITY);  // a row without keys
  target[5].zero_();
  const KlRows out = indexer_kl(scores, target, true);
  for (int64_t t = 0; t < T; ++t) {
    double norm = 0, kl = 0, entropy = 0, mine = 0;
    const int64_t n = t == 5 ? 0 : t + 1;
    for (int64_t s = 0; s < n; ++s) norm += std::exp(scores[t][s].item<double>());
    for (int64_t s = 0; s < n; ++s) {
      const double p = target[t][s].item<double>(), logq = scores[t][s].item<double>() - std::log(norm);
      kl += p > 0 ? p * (std::log(p) - logq) : 0;
      entropy -= p > 0 ? p * std::log(p) : 0;
      mine -= std::exp(logq) * logq;
      EXPECT_NEAR(out.gradient_TX[t][s].item<double>(), std::exp(logq) - p, 1e-14);
    }
    EXPECT_NEAR(out.rows_T[t].item<double>(), kl, 1e-14);
    EXPECT_NEAR(out.entropy_target_T[t].item<double>(), entropy, 1e-14);
    EXPECT_NEAR(out.entropy_prediction_T[t].item<double>(), mine, 1e-14);
    for (int64_t s = n; s < X; ++s) EXPECT_EQ(out.gradient_TX[t][s].item<double>(), 0);
  }
  EXPECT_EQ(out.rows_T[0].item<double>(), 0);  // one key
  const TopK best = topk_select(scores, 2);
  const at::Tensor mass = captured_mass(target, best);
  for (int64_t t = 0; t < 5; ++t) {
    double expected = 0;
    for (int i = 0; i < best.lengths_T[t].item<int>(); ++i) expected += target[t][best.indices_TK[t][i].item<int>()].item<double>();
    EXPECT_NEAR(mass[t].item<double>(), expected, 1e-15);
  }
  EXPECT_EQ(mass[5].item<double>(), 0);
}

// Megatron's rows [t, b] as one stream: row b*30+t.
class MegatronKl : public testing::TestWithParam<const char*> {};

TEST_P(MegatronKl, LossAndGradients) {
  const std::string set = GetParam();
  const Golden golden("megatron_kl");
  const int64_t T = 30, B = 2, H = 3, K = golden["in.topk"].item<int>();
  DSA_GUARD(T, K);
  const bool sparse = set.find("sparse") != std::string::npos, docs = set.starts_with("docs");
  const double scale = golden["in.softmax_scale"].item<double>();
  const auto stream = [&](const std::string& name) { return golden[name].to(at::kDouble).transpose(0, 1).flatten(0, 1).contiguous(); };
  const at::Tensor q = stream("in.q"), k = stream("in.k"), w = stream("in.weights"), query = stream("in.query"), key = stream("in.key");
  const at::Tensor offset = at::arange(B).repeat_interleave(T) * T;
  const at::Tensor start = offset + (docs ? golden["in.doc_starts"].to(at::kLong).repeat({B}) : at::zeros({B * T}, at::kLong));
  const at::Tensor end = offset + at::arange(1, T + 1).repeat({B});

  const at::Tensor scores = indexer_logits(q, k, w, start, end);
  if (!docs) {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < T; ++t)
        EXPECT_LE(relative_distance(scores[b * T + t].narrow(0, b * T, t + 1), golden["index_scores"][b][t].narrow(0, 0, t + 1)), 1e-11);
  }
  const TopK best = topk_select(scores, K);
  at::Tensor expected = golden[set + ".topk_indices"].view({B * T, K}).to(at::kLong);
  expected = at::where(expected < 0, expected, expected + offset.unsqueeze(1));
  ASSERT_TRUE(at::equal(best.indices_TK.to(at::kLong), expected));

  // Target: softmax of the main attention per head over the support, then the head mean.
  at::Tensor logits = at::matmul(query.transpose(0, 1), key.permute({1, 2, 0})) * scale;  // [H, rows, keys]
  at::Tensor visible = at::zeros({B * T, B * T}, at::kBool);
  if (sparse) {
    visible = at::zeros({B * T, B * T + 1}, at::kBool).scatter_(1, at::where(expected < 0, B * T, expected), true).narrow(1, 0, B * T);
  } else {
    visible = scores.isfinite();
  }
  const at::Tensor target = at::softmax(logits.masked_fill(visible.logical_not(), -INFINITY), 2).sum(0) / static_cast<double>(H);
  KlRows kl;
  IndexerGradients g;
  if (sparse) {
    const at::Tensor missing = expected < 0, target_TK = target.gather(1, expected.clamp_min(0)).masked_fill(missing, 0);
    kl = indexer_kl(indexer_logits_selected(q, k, w, best.indices_TK), target_TK, true);
    g = indexer_logits_selected_backward(kl.gradient_TX, q, k, w, best.indices_TK);
  } else {
    kl = indexer_kl(scores, target, true);
    g = indexer_logits_backward(kl.gradient_TX, q, k, w, start, end);
  }
  EXPECT_NEAR(kl.rows_T.sum().item<double>(), golden[set + ".loss_sum"].item<double>(), 1e-11);
  EXPECT_NEAR(kl.rows_T.mean().item<double>(), golden[set + ".loss_mean"].item<double>(), 1e-12);
  const double rows = B * T;  // the stored gradients are those of the mean
  EXPECT_LE(relative_distance(g.dq_TJD / rows, stream(set + ".grad.q")), 1e-11);
  EXPECT_LE(relative_distance(g.dk_SD / rows, stream(set + ".grad.k")), 1e-11);
  EXPECT_LE(relative_distance(g.dw_TJ / rows, stream(set + ".grad.weights")), 1e-11);
}

INSTANTIATE_TEST_SUITE_P(Sets, MegatronKl, testing::Values("dense", "sparse", "docs_dense", "docs_sparse"));

// At most `allowed` elements differ, each by one bf16 step.
void expect_bf16(const at::Tensor& got, const at::Tensor& expected, int64_t allowed, const std::string& what) {
  ASSERT_EQ(got.scalar_type(), at::kBFloat16) << what;
  const at::Tensor a = got.to(at::kDouble), b = expected.to(at::kDouble), distance = (a - b).abs();
  EXPECT_LE((distance > 0).sum().item<int64_t>(), allowed) << what;
  EXPECT_TRUE((distance <= b.abs() / 128 + 1e-30).all().item<bool>()) << what;
}

// [batch, time, ...] of the fixture as a stream of batch*time rows.
struct DeepSeek {
  Golden golden{"deepseek_indexer"};
  std::string set;
  int64_t B, T = 61, K = 16;
  at::Tensor start, end;
  RopeTable table;
  explicit DeepSeek(const std::string& set) : set(set), B(set == "far" ? 1 : 2) {
    const at::Tensor offset = at::arange(B).repeat_interleave(T) * T;
    start = offset;
    end = offset + at::arange(1, T + 1).repeat({B});
    const std::string prefix = set == "far" ? "far." : "";
    table = {golden[prefix + "rope.cos"].repeat({B, 1}), golden[prefix + "rope.sin"].repeat({B, 1})};
  }
  at::Tensor operator()(const std::string& name) const { return golden[set + "." + name].flatten(0, 1); }
  at::Tensor rotate(const at::Tensor& x) const {
    return at::cat({apply_rope(x.narrow(-1, 0, 64), table, RopeLayout::HALF), x.narrow(-1, 64, 64)}, -1);
  }
  // Scores [rows, rows of the own batch element] from codes, weights and key scales.
  at::Tensor scores(const Fp8Tensor& q, const Fp8Tensor& k, const at::Tensor& W) const {
    const at::Tensor all = indexer_logits(q.codes.to(at::kFloat), act_dequant(k), W, start, end);
    return at::cat([&] {
      std::vector<at::Tensor> own;
      for (int64_t b = 0; b < B; ++b) own.push_back(all.narrow(0, b * T, T).narrow(1, b * T, T));
      return own;
    }());
  }
  void expect_selection(const at::Tensor& scores_TS) const {
    const TopK best = topk_select(scores_TS, K);
    const at::Tensor index = best.indices_TK.to(at::kLong);
    const at::Tensor mask = at::zeros({B * T, T + 1}, at::kByte).scatter_(1, at::where(index < 0, T, index), 1).narrow(1, 0, T);
    EXPECT_TRUE(at::equal(mask, (*this)("topk_mask")));
  }
};

class DeepSeekIndexer : public testing::TestWithParam<const char*> {};

TEST_P(DeepSeekIndexer, StageByStage) {
  const DeepSeek x(GetParam());
  DSA_GUARD(x.T, x.K);
  if (x.set != "far") {  // the far set shares L1's inputs
    expect_bf16(layer_norm(x("k.proj"), x.golden[x.set + ".k_norm.weight"], x.golden[x.set + ".k_norm.bias"], 1e-6), x("k.norm"), 3, "k_norm");
    expect_bf16(x.rotate(x("q.proj")), x("q.rope"), 2, "q.rope");
    expect_bf16(x.rotate(x("k.norm")), x("k.rope"), 2, "k.rope");
  }
  expect_bf16(hadamard(x("q.rope")), x("q.hadamard"), 2, "q.hadamard");
  expect_bf16(hadamard(x("k.rope")), x("k.hadamard"), 2, "k.hadamard");
  const Fp8Tensor q = act_quant(x("q.hadamard")), k = act_quant(x("k.hadamard"));
  EXPECT_TRUE(at::equal(q.codes.view(at::kByte), x("q.code")));
  EXPECT_TRUE(at::equal(k.codes.view(at::kByte), x("k.code")));
  EXPECT_TRUE(at::equal(q.scale.squeeze(-1), x("q.scale")));
  EXPECT_TRUE(at::equal(k.scale.squeeze(-1), x("k.scale")));
  const at::Tensor scores = x.scores(q, k, x("W"));
  EXPECT_LE(relative_distance(scores, x("scores")), 1e-5);
  x.expect_selection(scores);
}

INSTANTIATE_TEST_SUITE_P(Sets, DeepSeekIndexer, testing::Values("L0", "L1", "far"));

TEST(DeepSeekChain, FromLayerInputsToSelection) {
  for (const char* set : {"L0", "L1"}) {
    const DeepSeek x(set);
    DSA_GUARD(x.T, x.K);
    const at::Tensor qr = x("qr"), h = x("h");
    const at::Tensor q = at::matmul(qr, x.golden[x.set + ".wq_b.weight"].t()).view({-1, 4, 128});
    const at::Tensor k = layer_norm(at::matmul(h, x.golden[x.set + ".wk.weight"].t()), x.golden[x.set + ".k_norm.weight"], x.golden[x.set + ".k_norm.bias"], 1e-6);
    const Fp8Tensor q8 = act_quant(hadamard(x.rotate(q))), k8 = act_quant(hadamard(x.rotate(k)));
    const at::Tensor weights = at::matmul(h.to(at::kFloat), x.golden[x.set + ".weights_proj.weight"].to(at::kFloat).t());
    const at::Tensor W = weights / std::sqrt(4.0) * q8.scale.squeeze(-1) / std::sqrt(128.0);
    EXPECT_LE(relative_distance(W, x("W")), 1e-6);
    EXPECT_LE((k8.codes.view(at::kByte) != x("k.code")).to(at::kDouble).mean().item<double>(), 0.01);
    const at::Tensor scores = x.scores(q8, k8, W);
    EXPECT_LE(relative_distance(scores, x("scores")), 1e-2);
    x.expect_selection(scores);
  }
  // Our fp32 table at both position ranges is the program's, to its own rounding.
  const Golden golden("deepseek_indexer");
  EXPECT_LE(relative_distance(rope_table(at::arange(61), {}, at::kFloat).cos_TR2, golden["rope.cos"]), 1e-6);
  EXPECT_LE(relative_distance(rope_table(at::arange(61) + 131008, {}, at::kFloat).sin_TR2, golden["far.rope.sin"]), 1e-6);
}

}  // namespace
}  // namespace dsa
