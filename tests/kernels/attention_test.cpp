// Dense and sparse attention against plain loops, finite differences, each other and Megatron's stored results.
#include <ATen/ops/einsum.h>
#include <ATen/ops/where.h>

#include <cmath>

#include "kernels/absorption/absorption.h"
#include "kernels/dense_mla/dense_mla.h"
#include "kernels/sparse_mla/sparse_mla.h"
#include "kernels/topk_select/topk_select.h"
#include "tests/support/dsa_guard.h"
#include "tests/support/golden.h"
#include "tests/support/tensors.h"

namespace dsa {
namespace {

constexpr double kScale = 0.4;

at::Tensor ints(const std::vector<int64_t>& values) {
  at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), out.data_ptr<int64_t>());
  return out;
}

struct Dense {
  at::Tensor o, lse, mass;
};

Dense plain_dense(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start, const at::Tensor& end) {
  const int64_t T = q.size(0), H = q.size(1), S = k.size(0), V = v.size(2);
  Dense out{at::zeros({T, H, V}, at::kDouble), at::full({T, H}, -INFINITY, at::kDouble), at::zeros({T, S}, at::kDouble)};
  auto Q = q.accessor<double, 3>(), K = k.accessor<double, 3>(), W = v.accessor<double, 3>(), O = out.o.accessor<double, 3>();
  auto L = out.lse.accessor<double, 2>(), M = out.mass.accessor<double, 2>();
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t h = 0; h < H; ++h) {
      const int64_t a = start[t].item<int64_t>(), b = end[t].item<int64_t>();
      std::vector<double> p(S);
      double sum = 0;
      for (int64_t s = a; s < b; ++s) {
        double dot = 0;
        for (int64_t d = 0; d < q.size(2); ++d) dot += Q[t][h][d] * K[s][h][d];
        sum += p[s] = std::exp(kScale * dot);
      }
      if (a < b) L[t][h] = std::log(sum);
      for (int64_t s = a; s < b; ++s) {
        M[t][s] += p[s] / sum;
        for (int64_t d = 0; d < V; ++d) O[t][h][d] += p[s] / sum * W[s][h][d];
      }
    }
  }
  return out;
}

// Two documents, rows in mixed order, one row without keys.
struct Packed {
  at::Tensor start = ints({0, 0, 0, 9, 9, 9, 9, 0, 5, 0, 9}), end = ints({1, 4, 9, 10, 14, 17, 20, 7, 5, 2, 11});
  at::Tensor q = random_tensor({11, 2, 6}, 1), k = random_tensor({20, 2, 6}, 2), v = random_tensor({20, 2, 5}, 3);
};

TEST(DenseMla, PlainLoopsForAnyBlock) {
  const Packed x;
  const Dense expected = plain_dense(x.q, x.k, x.v, x.start, x.end);
  for (const int64_t block : {1, 2, 3, 128}) {
    const auto out = dense_mla(x.q, x.k, x.v, x.start, x.end, kScale, block);
    EXPECT_LE(relative_distance(out.o_THV, expected.o), 1e-14);
    EXPECT_LE(relative_distance(out.lse_TH, expected.lse), 1e-14);
    EXPECT_LE(relative_distance(attention_mass(x.q, x.k, out.lse_TH, x.start, x.end, kScale), expected.mass), 1e-14);
  }
  const auto small = dense_mla(x.q.to(at::kBFloat16), x.k.to(at::kBFloat16), x.v.to(at::kBFloat16), x.start.to(at::kInt), x.end.to(at::kInt), kScale);
  EXPECT_EQ(small.o_THV.scalar_type(), at::kBFloat16);
  EXPECT_EQ(small.lse_TH.scalar_type(), at::kFloat);
  EXPECT_LE(relative_distance(small.o_THV, expected.o), 2e-2);
  EXPECT_THROW(dense_mla(x.q, x.k, x.v, x.start, x.end + 5, kScale), std::invalid_argument);
}

TEST(DenseMla, FiniteDifferences) {
  const Packed x;
  for (const int64_t block : {2, 128}) {
    expect_gradients([&](const auto& in) { return dense_mla(in[0], in[1], in[2], x.start, x.end, kScale, block).o_THV; }, {x.q, x.k, x.v}, 1e-6);
  }
}

TEST(DenseMla, PackedDocumentsEqualSeparateRuns) {
  const Packed x;
  at::Tensor q = random_tensor({20, 2, 6}, 4), start = at::arange(20), end = at::arange(1, 21);
  start = at::where(start < 9, at::zeros({20}, at::kLong), at::full({20}, 9, at::kLong));
  const auto packed = dense_mla(q, x.k, x.v, start, end, kScale, 16);
  for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 9}, {9, 11}}) {
    const auto alone = dense_mla(q.narrow(0, first, count), x.k.narrow(0, first, count), x.v.narrow(0, first, count),
                                 at::zeros({count}, at::kLong), at::arange(1, count + 1), kScale, 16);
    EXPECT_LE(relative_distance(packed.o_THV.narrow(0, first, count), alone.o_THV), 1e-14);
  }
}

// Random ascending lists of different lengths for a causal sequence of T keys.
TopK random_lists(int64_t T, int64_t K, uint64_t seed) {
  at::Tensor scores = random_tensor({T, T}, seed);
  scores.masked_fill_(at::arange(T).unsqueeze(0) > at::arange(T).unsqueeze(1), -INFINITY);
  return topk_select(scores, K);
}

TEST(SparseMla, PlainLoopsAndMass) {
  const int64_t T = 13, K = 5, H = 3, C = 7, E = 10;
  DSA_GUARD(T, K);
  const at::Tensor q = random_tensor({T, H, E}, 5), kv = random_tensor({T, E}, 6);
  TopK lists = random_lists(T, K, 7);
  lists.lengths_T[9] = 0;  // a row without keys; what its list still holds does not count
  at::Tensor o = at::zeros({T, H, C}, at::kDouble), lse = at::full({T, H}, -INFINITY, at::kDouble), mass = at::zeros({T, K}, at::kDouble);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t n = lists.lengths_T[t].item<int>();
    for (int64_t h = 0; h < H && n > 0; ++h) {
      std::vector<double> p(n);
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += p[i] = std::exp(kScale * (q[t][h] * kv[lists.indices_TK[t][i].item<int>()]).sum().item<double>());
      lse[t][h] = std::log(sum);
      for (int64_t i = 0; i < n; ++i) {
        mass[t][i] += p[i] / sum;
        o[t][h] += kv[lists.indices_TK[t][i].item<int>()].narrow(0, 0, C) * (p[i] / sum);
      }
    }
  }
  for (const int64_t block : {1, 4, 64}) {
    const auto out = sparse_mla(q, kv, lists.indices_TK, lists.lengths_T, kScale, C, block, true);
    EXPECT_LE(relative_distance(out.o_THC, o), 1e-14);
    EXPECT_LE(relative_distance(out.lse_TH, lse), 1e-14);
    EXPECT_LE(relative_distance(out.mass_TK, mass), 1e-14);
  }
  EXPECT_FALSE(sparse_mla(q, kv, lists.indices_TK, lists.lengths_T, kScale, C).mass_TK.defined());
  const auto small = sparse_mla(q.to(at::kBFloat16), kv.to(at::kBFloat16), lists.indices_TK, lists.lengths_T, kScale, C);
  EXPECT_LE(relative_distance(small.o_THC, o), 2e-2);
  expect_gradients([&](const auto& in) { return sparse_mla(in[0], in[1], lists.indices_TK, lists.lengths_T, kScale, C, 4).o_THC; }, {q, kv}, 1e-6);
}

TEST(SparseMla, LatentFormEqualsMaskedMultiHead) {
  // W_UK and W_UV of H heads: MHA keys [W_UK c ; k_rope], values W_UV c; MQA queries [W_UK^T q_nope ; q_rope].
  const int64_t T = 40, K = 11, H = 3, C = 8, N = 5, R = 4, V = 6;
  DSA_GUARD(T, K);
  const at::Tensor latent = random_tensor({T, C}, 8), k_rope = random_tensor({T, R}, 9), q_nope = random_tensor({T, H, N}, 10),
                   q_rope = random_tensor({T, H, R}, 11), w_uk = random_tensor({H, N, C}, 12), w_uv = random_tensor({H, V, C}, 13);
  const at::Tensor k = at::cat({at::matmul(w_uk, latent.t()).permute({2, 0, 1}), k_rope.unsqueeze(1).expand({T, H, R})}, 2).contiguous();
  const at::Tensor v = at::matmul(w_uv, latent.t()).permute({2, 0, 1}).contiguous();
  const RopeTable table = rope_table(at::arange(T) * 3, {.dim = R}, at::kDouble);
  const at::Tensor q = at::cat({q_nope, apply_rope(q_rope, table, RopeLayout::INTERLEAVED)}, 2);
  const at::Tensor q_latent = absorbed_queries(at::cat({q_nope, q_rope}, 2), w_uk, table);
  const TopK lists = random_lists(T, K, 14);
  const auto sparse = sparse_mla(q_latent, at::cat({latent, k_rope}, 1), lists.indices_TK, lists.lengths_T, kScale, C, 16, true);
  const at::Tensor o_sparse = expanded_values(sparse.o_THC, w_uv);
  // Masked MHA row by row: dense attention over the gathered keys of that row alone.
  for (int64_t t = 0; t < T; ++t) {
    const int64_t n = lists.lengths_T[t].item<int>();
    const at::Tensor keys = lists.indices_TK[t].narrow(0, 0, n).to(at::kLong);
    const Dense row = plain_dense(q.narrow(0, t, 1), k.index_select(0, keys), v.index_select(0, keys), ints({0}), ints({n}));
    EXPECT_LE(relative_distance(o_sparse.narrow(0, t, 1), row.o), 1e-12);
    EXPECT_LE(relative_distance(sparse.mass_TK.narrow(0, t, 1).narrow(1, 0, n), row.mass), 1e-12);
  }
  // Rows with no more than K keys select all of them: there sparse is dense.
  const auto dense = dense_mla(q, k, v, at::zeros({T}, at::kLong), at::arange(1, T + 1), kScale);
  EXPECT_LE(relative_distance(o_sparse.narrow(0, 0, K), dense.o_THV.narrow(0, 0, K)), 1e-13);
  EXPECT_GT(relative_distance(o_sparse.narrow(0, K, T - K), dense.o_THV.narrow(0, K, T - K)), 1e-2);
}

TEST(Absorption, ProductsAndTheirGradients) {
  const int64_t T = 7, H = 3, P = 5, R = 4, C = 6;
  const RopeTable table = rope_table(at::arange(T) * 11, {.dim = R}, at::kDouble);
  expect_gradients([&](const auto& in) { return absorbed_queries(in[0], in[1], table); },
                   {random_tensor({T, H, P + R}, 20), random_tensor({H, P, C}, 21)}, 1e-6);
  expect_gradients([&](const auto& in) { return expanded_values(in[0], in[1]); },
                   {random_tensor({T, H, C}, 22), random_tensor({H, P, C}, 23)}, 1e-6);
  EXPECT_THROW(absorbed_queries(random_tensor({T, H, P}, 24), random_tensor({H, P, C}, 21), table), std::invalid_argument);
  EXPECT_THROW(expanded_values(random_tensor({T, H, C + 1}, 25), random_tensor({H, P, C}, 23)), std::invalid_argument);
}

TEST(Absorption, LargeProductsOfEveryDtype) {
  const int64_t T = 90, H = 4, P = 32, R = 16, C = 48;  // large enough for the library's own products
  for (const auto& [dtype, bound] : {std::pair(at::kDouble, 1e-13), {at::kFloat, 1e-5}, {at::kBFloat16, 2e-2}}) {
    const RopeTable table = rope_table(at::arange(T), {.dim = R}, dtype), exact = rope_table(at::arange(T), {.dim = R}, at::kDouble);
    const at::Tensor x = random_tensor({T, H, P + R}, 30).to(dtype), w_whole = random_tensor({H, P + 3, C}, 31).to(dtype);
    const at::Tensor w = w_whole.narrow(1, 3, P);  // rows of a wider matrix, as W_UK is of W_UKV
    const at::Tensor y = absorbed_queries(x, w, table);
    const at::Tensor X = x.to(at::kDouble), W = w.to(at::kDouble);
    EXPECT_EQ(y.scalar_type(), dtype);
    EXPECT_TRUE(y.is_contiguous());
    EXPECT_LE(relative_distance(y.narrow(2, 0, C).to(at::kDouble), at::einsum("thp,hpc->thc", {X.narrow(2, 0, P), W})), bound);
    EXPECT_LE(relative_distance(y.narrow(2, C, R).to(at::kDouble), apply_rope(X.narrow(2, P, R), exact, RopeLayout::INTERLEAVED)), bound);
    const at::Tensor v = expanded_values(y.narrow(2, 0, C), w);  // rows apart
    EXPECT_TRUE(v.is_contiguous());
    EXPECT_LE(relative_distance(v.to(at::kDouble), at::einsum("thc,hvc->thv", {y.narrow(2, 0, C).to(at::kDouble), W})), bound);
  }
}

TEST(SparseMla, MegatronsSparseAttention) {
  const Golden golden("megatron_kl");
  const int64_t T = 30, K = 10, H = 3;
  DSA_GUARD(T, K);
  const double scale = golden["in.softmax_scale"].item<double>();
  const at::Tensor query = golden["in.query"].to(at::kDouble), key = golden["in.key"].to(at::kDouble), value = golden["attn.in.value"].to(at::kDouble);
  const at::Tensor dout = golden["attn.in.dout"].to(at::kDouble).view({T, 2, H, 10}), expected = golden["attn.out"].view({T, 2, H, 10});
  const at::Tensor shared = golden["absorbed.in.key"].to(at::kDouble), shared_dout = golden["absorbed.in.dout"].to(at::kDouble);
  for (int64_t b = 0; b < 2; ++b) {
    const at::Tensor indices = golden["sparse.topk_indices"][b], lengths = (indices >= 0).sum(1).to(at::kInt);
    // A key per head: one call a head, with [value | key] as the shared entry and [0 | query] as the query.
    for (int64_t h = 0; h < H; ++h) {
      const auto head = [&](const at::Tensor& x) { return x.select(1, b).select(1, h); };
      at::Tensor q = at::cat({at::zeros({T, 10}, at::kDouble), head(query)}, 1).unsqueeze(1).requires_grad_(true);
      at::Tensor kv = at::cat({head(value), head(key)}, 1).requires_grad_(true);
      const at::Tensor o = sparse_mla(q, kv, indices, lengths, scale, 10).o_THC;
      EXPECT_LE(relative_distance(o.squeeze(1), head(expected)), 1e-11);
      o.backward(head(dout).unsqueeze(1).contiguous());
      EXPECT_LE(relative_distance(q.grad().squeeze(1).narrow(1, 10, 14), head(golden["attn.grad.query"])), 1e-11);
      EXPECT_LE(relative_distance(kv.grad().narrow(1, 0, 10), head(golden["attn.grad.value"])), 1e-11);
      EXPECT_LE(relative_distance(kv.grad().narrow(1, 10, 14), head(golden["attn.grad.key"])), 1e-11);
    }
    const int64_t C = golden["absorbed.v_channels"].item<int>();
    at::Tensor q = query.select(1, b).contiguous().requires_grad_(true), kv = shared.select(1, b).squeeze(1).contiguous().requires_grad_(true);
    const at::Tensor o = sparse_mla(q, kv, indices, lengths, scale, C).o_THC;
    EXPECT_LE(relative_distance(o, golden["absorbed.out"].select(1, b)), 1e-11);
    o.backward(shared_dout.select(1, b).contiguous());
    EXPECT_LE(relative_distance(q.grad(), golden["absorbed.grad.query"].select(1, b)), 1e-11);
    EXPECT_LE(relative_distance(kv.grad(), golden["absorbed.grad.key"].select(1, b).squeeze(1)), 1e-11);
  }
}

TEST(SparseMla, LargeBlocksAreRepeatable) {
  const int64_t T = 300, K = 40, H = 4, C = 64, E = 80;
  DSA_GUARD(T, K);
  const TopK lists = random_lists(T, K, 15);
  const at::Tensor x = random_tensor({T, H, E}, 16).to(at::kFloat), y = random_tensor({T, E}, 17).to(at::kFloat);
  std::vector<at::Tensor> gradients;
  for (int i = 0; i < 2; ++i) {
    at::Tensor q = x.clone().requires_grad_(true), kv = y.clone().requires_grad_(true);
    sparse_mla(q, kv, lists.indices_TK, lists.lengths_T, 0.1, C).o_THC.square().sum().backward();
    gradients.push_back(kv.grad());
  }
  EXPECT_TRUE(at::equal(gradients[0], gradients[1]));
  at::Tensor q = x.to(at::kDouble).requires_grad_(true), kv = y.to(at::kDouble).requires_grad_(true);
  sparse_mla(q, kv, lists.indices_TK, lists.lengths_T, 0.1, C).o_THC.square().sum().backward();
  EXPECT_LE(relative_distance(gradients[0], kv.grad()), 1e-5);
}

}  // namespace
}  // namespace dsa
