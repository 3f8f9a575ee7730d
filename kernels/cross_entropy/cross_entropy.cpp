// See cross_entropy.h. Tiles of kTileRows tokens x kTileVocab words; statistics are merged over the tiles online:
//   m' = max(m, m_tile);  sum' = sum exp(m - m') + sum_tile exp(m_tile - m')
#include "kernels/cross_entropy/cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "kernels/check.h"
#include "kernels/cross_entropy/native.h"
#include "kernels/native.h"
#include "kernels/packed/packed.h"

namespace dsa {
namespace {

// On a CPU the logits of a tile stay in its caches; on a GPU the products are large enough to fill it.
constexpr int64_t kTileRows = 1024, kTileVocab = 8192;
constexpr int64_t kTileRowsOfGpu = 4096, kTileVocabOfGpu = 16384;

void check(const at::Tensor& hidden_NH, const at::Tensor& weight_VH, const at::Tensor& target_N, const char* op) {
  require(hidden_NH.dim() == 2 && weight_VH.dim() == 2 && hidden_NH.size(1) == weight_VH.size(1),
          "{}: hidden {} and weight {} ([tokens, hidden] and [words, hidden] are expected) reshape them", op,
          shape_of(hidden_NH), shape_of(weight_VH));
  require_shape(target_N, {hidden_NH.size(0)}, op, "target");
  require(target_N.scalar_type() == at::kLong, "{}: targets are {} (int64 is expected) convert them", op, toString(target_N.scalar_type()));
}

// Which targets of the rows lie in words [first, first + words) of the shard, and where.
struct LocalTarget {
  at::Tensor inside_B, column_B;
};

LocalTarget local_target(const at::Tensor& target_B, int64_t first, int64_t words) {
  const at::Tensor column = target_B - first;
  return {at::logical_and(target_B >= 0, at::logical_and(column >= 0, column < words)), column.clamp(0, words - 1)};
}

// Calls body(first row, rows, first word, hidden tile, weight tile), word tiles outermost. The tiles are in the
// accumulation dtype, on a GPU in their own: its matrix units take bf16 and sum in fp32.
template <typename Body>
void for_each_tile(const at::Tensor& hidden_NH, const at::Tensor& weight_VH, const Body& body) {
  const auto acc = hidden_NH.is_cuda() ? hidden_NH.scalar_type() : accumulation_type(hidden_NH);
  const int64_t N = hidden_NH.size(0), V = weight_VH.size(0);
  const int64_t tile_rows = hidden_NH.is_cuda() ? kTileRowsOfGpu : kTileRows;
  const int64_t tile_words = hidden_NH.is_cuda() ? kTileVocabOfGpu : kTileVocab;
  for (int64_t v = 0; v < V; v += tile_words) {
    const at::Tensor weight = weight_VH.narrow(0, v, std::min(tile_words, V - v)).detach().to(acc);
    for (int64_t n = 0; n < N; n += tile_rows) {
      const int64_t rows = std::min(tile_rows, N - n);
      body(n, rows, v, hidden_NH.narrow(0, n, rows).detach().to(acc), weight);
    }
  }
}

bool uses_native(const at::Tensor& hidden_NH) {
  const char* why_not = nullptr;
  const bool yes = native::vocab_tile_supports(hidden_NH, &why_not);
  ran("cross_entropy", yes ? "sm90" : std::string("reference (") + why_not + ")");
  return yes;
}

}  // namespace

VocabShardStatistics vocab_shard_statistics(const at::Tensor& hidden_NH, const at::Tensor& weight_VH,
                                            const at::Tensor& target_N, int64_t offset) {
  check(hidden_NH, weight_VH, target_N, "vocab_shard_statistics");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto options = hidden_NH.options().dtype(accumulation_type(hidden_NH));
  const int64_t N = hidden_NH.size(0);
  const bool fused = uses_native(hidden_NH);
  VocabShardStatistics out{at::empty({N}, options).fill_(-std::numeric_limits<double>::infinity()),
                           at::zeros({N}, options), at::zeros({N}, options)};
  for_each_tile(hidden_NH, weight_VH, [&](int64_t n, int64_t rows, int64_t v, const at::Tensor& hidden, const at::Tensor& weight) {
    const at::Tensor logits_BX = wide_mm(hidden, weight.t());
    if (fused) {
      native::vocab_tile_statistics(logits_BX, target_N.narrow(0, n, rows), offset + v, out.max_N.narrow(0, n, rows),
                                    out.sum_exp_N.narrow(0, n, rows), out.target_logit_N.narrow(0, n, rows));
      return;
    }
    const LocalTarget target = local_target(target_N.narrow(0, n, rows), offset + v, weight.size(0));
    out.target_logit_N.narrow(0, n, rows)
        .add_(logits_BX.gather(1, target.column_B.unsqueeze(1)).squeeze(1).mul_(target.inside_B));
    const at::Tensor max_B = out.max_N.narrow(0, n, rows), sum_B = out.sum_exp_N.narrow(0, n, rows);
    const at::Tensor larger_B = at::maximum(max_B, logits_BX.amax(1));
    sum_B.mul_((max_B - larger_B).exp_()).add_(logits_BX.sub_(larger_B.unsqueeze(1)).exp_().sum(1));
    max_B.copy_(larger_B);
  });
  return out;
}

VocabShardGradients vocab_shard_gradients(const at::Tensor& hidden_NH, const at::Tensor& weight_VH,
                                          const at::Tensor& target_N, int64_t offset, const at::Tensor& lse_N,
                                          const at::Tensor& grad_N) {
  check(hidden_NH, weight_VH, target_N, "vocab_shard_gradients");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto acc = accumulation_type(hidden_NH);
  const bool fused = uses_native(hidden_NH);
  VocabShardGradients out{at::zeros(hidden_NH.sizes(), hidden_NH.options().dtype(acc)),
                          at::zeros(weight_VH.sizes(), weight_VH.options())};
  at::Tensor dweight_tile;
  for_each_tile(hidden_NH, weight_VH, [&](int64_t n, int64_t rows, int64_t v, const at::Tensor& hidden, const at::Tensor& weight) {
    const at::Tensor target_B = target_N.narrow(0, n, rows), lse_B = lse_N.narrow(0, n, rows), grad_B = grad_N.narrow(0, n, rows);
    at::Tensor d_BX = wide_mm(hidden, weight.t());
    if (fused) {
      d_BX = native::vocab_tile_gradient(d_BX, target_B, offset + v, lse_B, grad_B);
    } else {
      const LocalTarget target = local_target(target_B, offset + v, weight.size(0));
      d_BX.sub_(lse_B.unsqueeze(1)).exp_();
      d_BX.scatter_add_(1, target.column_B.unsqueeze(1), target.inside_B.to(acc).neg_().unsqueeze(1));
      d_BX = d_BX.mul_(grad_B.unsqueeze(1)).to(weight.scalar_type());
    }
    out.dhidden_NH.narrow(0, n, rows).add_(wide_mm(d_BX, weight));
    // The rows' parts of a word tile are summed in the accumulation dtype and rounded once.
    if (n == 0) dweight_tile = at::zeros(weight.sizes(), weight.options().dtype(acc));
    dweight_tile.add_(wide_mm(d_BX.t(), hidden));
    if (n + rows == hidden_NH.size(0)) out.dweight_VH.narrow(0, v, weight.size(0)).copy_(dweight_tile);
  });
  return out;
}

at::Tensor vocab_shard_logits(const at::Tensor& hidden_NH, const at::Tensor& weight_VH) {
  const auto acc = accumulation_type(hidden_NH);
  return at::mm(hidden_NH.to(acc), weight_VH.to(acc).t());
}

}  // namespace dsa
