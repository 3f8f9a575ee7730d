// Router, balance loss and the sharded cross-entropy against plain loops and finite differences.
#include <algorithm>
#include <cmath>

#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/router/router.h"
#include "tests/support/tensors.h"

namespace dsa {
namespace {

// The rule in plain loops. bias may make scores negative: a dropped group must never win.
std::vector<int64_t> choose(const std::vector<double>& ranked, const RouterParameters& p) {
  const int64_t E = ranked.size(), per_group = E / p.n_group;
  std::vector<std::pair<double, int64_t>> groups;
  for (int64_t g = 0; g < p.n_group; ++g) {
    std::vector<double> member(ranked.begin() + g * per_group, ranked.begin() + (g + 1) * per_group);
    std::sort(member.rbegin(), member.rend());
    groups.push_back({-(member[0] + (per_group > 1 ? member[1] : 0)), g});
  }
  std::sort(groups.begin(), groups.end());
  std::vector<std::pair<double, int64_t>> candidates;
  for (int64_t i = 0; i < p.topk_group; ++i)
    for (int64_t e = 0; e < per_group; ++e) candidates.push_back({-ranked[groups[i].second * per_group + e], groups[i].second * per_group + e});
  std::sort(candidates.begin(), candidates.end());
  std::vector<int64_t> chosen;
  for (int64_t k = 0; k < p.top_k; ++k) chosen.push_back(candidates[k].second);
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

TEST(Router, MatchesTheRuleInPlainLoops) {
  for (const RouterParameters p : {RouterParameters{4, 2, 3, 2.5, true}, RouterParameters{1, 1, 5, 1.0, false}, RouterParameters{8, 3, 3, 2.5, true}, RouterParameters{16, 4, 4, 1.5, true}}) {
    at::Tensor logits = random_tensor({200, 16}, 1);
    logits = (logits * 4).round() / 4;  // many ties
    const at::Tensor bias = (random_tensor({16}, 2) * 4).round() / 4 - 1;
    const RouterOutput out = route(logits, bias, p);
    for (int64_t n = 0; n < 200; ++n) {
      std::vector<double> s(16), ranked(16);
      for (int e = 0; e < 16; ++e) {
        s[e] = at::sigmoid(logits[n][e]).item<double>();
        ranked[e] = s[e] + bias[e].item<double>();
      }
      const auto chosen = choose(ranked, p);
      double sum = 0;
      for (const auto e : chosen) sum += s[e];
      for (int64_t k = 0; k < p.top_k; ++k) {
        ASSERT_EQ(out.experts_NK[n][k].item<int64_t>(), chosen[k]) << "token " << n;
        EXPECT_NEAR(out.weights_NK[n][k].item<double>(), s[chosen[k]] / (p.norm_topk_prob ? sum : 1) * p.scaling, 1e-14);
      }
    }
  }
}

TEST(Router, WeightsDifferentiateAndBadInputIsRefused) {
  const RouterParameters p{4, 2, 3, 2.5, true};
  expect_gradients([&](const auto& in) { return route(in[0], at::Tensor(), p).weights_NK; }, {random_tensor({9, 8}, 3)}, 1e-6);
  EXPECT_THROW(route(random_tensor({2, 6}, 1), at::Tensor(), p), std::invalid_argument);
  EXPECT_THROW(route(random_tensor({2, 8}, 1), at::Tensor(), {4, 1, 3, 1, true}), std::invalid_argument);
  at::Tensor bad = random_tensor({2, 8}, 1);
  bad[1][3] = NAN;
  EXPECT_THROW(route(bad, at::Tensor(), p), std::invalid_argument);
}

TEST(Balance, LossAndGradientAndSumOverRanks) {
  const int64_t N = 24, E = 6, K = 2, B = 2;
  const at::Tensor logits = random_tensor({N, E}, 4), sequence = at::arange(N).div(12, "floor"), tokens = at::full({B}, 12, at::kLong);
  const BalanceSums sums = balance_sums(logits, sequence, B, K);
  const at::Tensor loss = balance_loss(sums.count_BE, sums.probability_BE, tokens, K);
  for (int b = 0; b < B; ++b) {
    std::vector<double> f(E), P(E);
    for (int t = 12 * b; t < 12 * b + 12; ++t) {
      double total = 0;
      std::vector<std::pair<double, int>> order;
      for (int e = 0; e < E; ++e) {
        const double s = at::sigmoid(logits[t][e]).item<double>();
        total += s;
        order.push_back({-s, e});
      }
      std::sort(order.begin(), order.end());
      for (int k = 0; k < K; ++k) f[order[k].second] += double(E) / (K * 12);
      for (int e = 0; e < E; ++e) P[e] += at::sigmoid(logits[t][e]).item<double>() / total / 12;
    }
    double expected = 0;
    for (int e = 0; e < E; ++e) expected += f[e] * P[e];
    EXPECT_NEAR(loss[b].item<double>(), expected, 1e-14);
  }
  expect_gradients([&](const auto& in) {
    const BalanceSums s = balance_sums(in[0], sequence, B, K);
    return balance_loss(s.count_BE, s.probability_BE, tokens, K);
  }, {logits}, 1e-6);
  // Tokens split over two ranks in any order: counts summed, each rank's own probability; losses add up.
  const at::Tensor mine = at::arange(0, N, 2), other = at::arange(1, N, 2);
  const BalanceSums a = balance_sums(logits.index_select(0, mine), sequence.index_select(0, mine), B, K);
  const BalanceSums b = balance_sums(logits.index_select(0, other), sequence.index_select(0, other), B, K);
  const at::Tensor count = a.count_BE + b.count_BE;
  EXPECT_LE(relative_distance(balance_loss(count, a.probability_BE, tokens, K) + balance_loss(count, b.probability_BE, tokens, K), loss), 1e-14);
}

TEST(CrossEntropy, ShardsEqualTheWholeVocabulary) {
  // 1,100 tokens and 9,000 words: two tiles of each kind in the first shard.
  const int64_t N = 1100, H = 6, V = 9000, cut = 8300;
  const at::Tensor hidden = random_tensor({N, H}, 5), weight = random_tensor({V, H}, 6);
  at::Tensor target = (at::arange(N) * 7919) % V;
  target[3] = -100;
  target[4] = cut - 1;
  target[5] = cut;
  const at::Tensor logits = hidden.matmul(weight.t()), log_p = at::log_softmax(logits, 1);
  std::vector<VocabShardStatistics> parts;
  const std::vector<std::pair<int64_t, int64_t>> shards{{0, cut}, {cut, V - cut}};
  for (const auto& [offset, words] : shards) parts.push_back(vocab_shard_statistics(hidden, weight.narrow(0, offset, words), target, offset));
  const at::Tensor m = at::maximum(parts[0].max_N, parts[1].max_N);
  const at::Tensor lse = m + (parts[0].sum_exp_N * (parts[0].max_N - m).exp() + parts[1].sum_exp_N * (parts[1].max_N - m).exp()).log();
  const at::Tensor target_logit = parts[0].target_logit_N + parts[1].target_logit_N;
  EXPECT_LE(relative_distance(lse, at::logsumexp(logits, 1)), 1e-14);
  EXPECT_EQ(target_logit[3].item<double>(), 0);
  const at::Tensor valid = target >= 0;
  const at::Tensor expected = log_p.gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1).neg() * valid;
  EXPECT_LE(relative_distance((lse - target_logit) * valid, expected), 1e-13);

  const at::Tensor grad = at::linspace(0.5, 1.5, N, at::kDouble) * valid;
  at::Tensor d = log_p.exp();
  d.scatter_add_(1, target.clamp_min(0).unsqueeze(1), at::full({N, 1}, -1.0, at::kDouble));
  d *= grad.unsqueeze(1);
  at::Tensor dhidden = at::zeros_like(hidden), dweight = at::empty_like(weight);
  for (const auto& [offset, words] : shards) {
    const auto g = vocab_shard_gradients(hidden, weight.narrow(0, offset, words), target, offset, lse, grad);
    dhidden += g.dhidden_NH;
    dweight.narrow(0, offset, words).copy_(g.dweight_VH);
  }
  EXPECT_LE(relative_distance(dhidden, d.matmul(weight)), 1e-12);
  EXPECT_LE(relative_distance(dweight, d.t().matmul(hidden)), 1e-12);
  // bf16 inputs, fp32 logits.
  const at::Tensor h16 = hidden.to(at::kBFloat16), w16 = weight.to(at::kBFloat16);
  const auto rough = vocab_shard_statistics(h16, w16, target, 0);
  EXPECT_EQ(rough.max_N.scalar_type(), at::kFloat);
  EXPECT_LE(relative_distance(rough.max_N + rough.sum_exp_N.log(), at::logsumexp(h16.to(at::kDouble).matmul(w16.to(at::kDouble).t()), 1)), 1e-6);
}

}  // namespace
}  // namespace dsa
