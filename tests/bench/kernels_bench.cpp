// Attention of one layer, forward and backward, dense against sparse: 16 heads, keys 128 + 64 (dense) or latent 512 + 64
// (sparse), 4,096 tokens, top-k 256; the sparse path includes scoring, selection, the KL rows and the indexer's backward.
// usage: kernels_bench [tokens] [heads] [top_k] [indexer heads] [repeats]
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>

#include "kernels/dense_mla/dense_mla.h"
#include "kernels/indexer_kl/indexer_kl.h"
#include "kernels/indexer_logits/indexer_logits.h"
#include "kernels/indexer_topk/indexer_topk.h"
#include "kernels/sparse_mla/sparse_mla.h"

namespace {

struct Cost {
  double wall, cpu;  // seconds; on a busy machine the processor time is the steadier number
  Cost operator+(const Cost& other) const { return {wall + other.wall, cpu + other.cpu}; }
};

Cost measure(int repeats, const std::function<void()>& body) {
  body();
  const auto begin = std::chrono::steady_clock::now();
  const std::clock_t cpu = std::clock();
  for (int i = 0; i < repeats; ++i) body();
  return {std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / repeats,
          static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC / repeats};
}

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  const int64_t T = number(1, 4096), H = number(2, 16), K = number(3, 256), J = number(4, 8), repeats = number(5, 2);
  const int64_t C = 512, R = 64, N = 128, V = 128, D = 128;
  const auto f32 = at::TensorOptions().dtype(at::kFloat);
  const at::Tensor start = at::zeros({T}, at::kLong), end = at::arange(1, T + 1);
  const auto leaf = [&](at::IntArrayRef sizes) { return at::randn(sizes, f32).requires_grad_(true); };
  std::printf("%ld tokens, %ld heads, top-k %ld, %ld indexer heads, %d threads\n", T, H, K, J, at::get_num_threads());
  const auto report = [&](const char* what, Cost c, double flop) {
    std::printf("%-28s %8.0f ms %8.0f ms of processor %8.0f tokens/s %6.1f GFLOP/s\n", what, c.wall * 1e3, c.cpu * 1e3,
                T / c.wall, flop / c.wall * 1e-9);
  };
  const double causal = 0.5 * T * (T + 1), chosen = 0.5 * K * (K + 1) + double(T - K) * K;

  const at::Tensor q = leaf({T, H, N + R}), k = leaf({T, H, N + R}), v = leaf({T, H, V}), dense_grad = at::randn({T, H, V}, f32);
  const Cost dense_forward = measure(repeats, [&] { dsa::dense_mla(q.detach(), k.detach(), v.detach(), start, end, 0.07); });
  const Cost dense = measure(repeats, [&] { dsa::dense_mla(q, k, v, start, end, 0.07).o_THV.backward(dense_grad); });
  report("dense forward", dense_forward, 2 * causal * H * (N + R + V));
  report("dense forward + backward", dense, 2 * causal * H * (4 * (N + R) + 3 * V));

  const at::Tensor iq = at::randn({T, J, D}, f32), ik = at::randn({T, D}, f32), iw = at::randn({T, J}, f32) * 0.03;
  dsa::TopK best;
  const Cost scoring = measure(repeats, [&] { dsa::indexer_logits(iq, ik, iw, start, end); });
  const at::Tensor logits = dsa::indexer_logits(iq, ik, iw, start, end);
  const Cost selecting = measure(repeats, [&] { dsa::topk_select(logits, K); });
  const Cost both = measure(repeats, [&] { best = dsa::indexer_topk(iq, ik, iw, start, end, K); });
  report("indexer scores", scoring, 2 * causal * J * D);
  report("top-k of the scores", selecting, 0);
  report("score + select by blocks", both, 2 * causal * J * D);

  const at::Tensor ql = leaf({T, H, C + R}), kv = leaf({T, C + R}), sparse_grad = at::randn({T, H, C}, f32);
  const auto attend = [&](const at::Tensor& query, const at::Tensor& keys) {
    return dsa::sparse_mla(query, keys, best.indices_TK, best.lengths_T, 0.04, C, 64, true);
  };
  const Cost sparse_forward = measure(repeats, [&] { attend(ql.detach(), kv.detach()); });
  const Cost sparse = measure(repeats, [&] { attend(ql, kv).o_THC.backward(sparse_grad); });
  report("sparse forward", sparse_forward, 2 * chosen * H * (2 * C + R));
  report("sparse forward + backward", sparse, 2 * chosen * H * (6 * C + R + 3 * R));
  const at::Tensor mass = attend(ql.detach(), kv.detach()).mass_TK / static_cast<double>(H);
  const Cost indexer = measure(repeats, [&] {
    const auto kl = dsa::indexer_kl(dsa::indexer_logits_selected(iq, ik, iw, best.indices_TK), mass, true);
    dsa::indexer_logits_selected_backward(kl.gradient_TX, iq, ik, iw, best.indices_TK);
  });
  report("KL + indexer backward", indexer, 2 * chosen * J * D * 4);
  const Cost all = both + sparse + indexer;
  report("SPARSE in all", all, 0);
  report("DENSE in all", dense, 0);
  std::printf("sparse is %.2f times as fast (by processor time %.2f)\n", dense.wall / all.wall, dense.cpu / all.cpu);
}
