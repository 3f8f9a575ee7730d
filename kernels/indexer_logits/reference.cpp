// Scores by blocks: one matrix product gives q.k for all heads of a few rows and one tile of keys, a batched
// product with w sums the heads. The gradients use r = max(0, q.k): its sign is the ReLU's derivative.
// Letters as in indexer_logits.h; B rows of a block, M = B*J, X keys of a tile.
#include "kernels/indexer_logits/reference.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "kernels/gathered_rows/gathered_rows.h"
#include "kernels/packed/packed.h"

namespace dsa::reference {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
constexpr int64_t kTileRows = 256;             // rows of a forward product: B*J
constexpr int64_t kTileKeys = 512;             // its columns: 512 KiB of fp32, stays in a core's L2
constexpr int64_t kBackwardElements = 1 << 20;  // B*J*X of a dense backward tile: stays in L3
constexpr int64_t kSelectedElements = 32 << 10;  // B*J*K of a tile of the selected form, one thread
constexpr int64_t kFactorElements = 1 << 20;  // R*J*(K+D) a thread between the two halves of its backward pass: in L3

// max(0, q.k) of the block's rows against a tile of keys, in the accumulation dtype.
at::Tensor relu_scores(const at::Tensor& q_MD, const at::Tensor& k_XD) { return at::mm(q_MD, k_XD.t()).relu_(); }

// Rows of a tile of the selected form.
int64_t selected_rows(int64_t T, int64_t J, int64_t K, at::Device device) {
  const int64_t budget = device.is_cpu() ? kSelectedElements : 256 * kSelectedElements;
  return std::clamp<int64_t>(budget / std::max<int64_t>(J * K, 1), 1, std::max<int64_t>(T, 1));
}

}  // namespace

at::Tensor indexer_logits(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ,
                          const at::Tensor& start_T, const at::Tensor& end_T) {
  const auto acc = accumulation_type(q_TJD);
  const int64_t T = q_TJD.size(0), J = q_TJD.size(1), D = q_TJD.size(2), S = k_SD.size(0);
  const KeyRanges ranges(start_T, end_T, T, S);
  const auto blocks = row_blocks(ranges, std::max<int64_t>(1, kTileRows / J));
  const at::Tensor k = k_SD.to(acc);
  at::Tensor logits_TS = at::full({T, S}, kMinusInfinity, q_TJD.options().dtype(acc));
  for_each_block(blocks.size(), q_TJD.device(), [&](int64_t i) {
    const RowBlock& block = blocks[i];
    const int64_t B = block.row_end - block.row_begin, keys = block.key_end - block.key_begin;
    if (keys == 0) return;
    const at::Tensor q_MD = q_TJD.narrow(0, block.row_begin, B).to(acc).reshape({B * J, D});
    const at::Tensor w_B1J = w_TJ.narrow(0, block.row_begin, B).to(acc).unsqueeze(1);
    const at::Tensor out_BX = logits_TS.narrow(0, block.row_begin, B).narrow(1, block.key_begin, keys);
    for (int64_t x = 0; x < keys; x += kTileKeys) {
      const int64_t n = std::min(kTileKeys, keys - x);
      const at::Tensor r_BJX = relu_scores(q_MD, k.narrow(0, block.key_begin + x, n)).view({B, J, n});
      out_BX.narrow(1, x, n).copy_(at::bmm(w_B1J, r_BJX).squeeze(1));
    }
    fill_outside(out_BX, block, ranges, kMinusInfinity);
  });
  return logits_TS;
}

IndexerGradients indexer_logits_backward(const at::Tensor& dI_TS, const at::Tensor& q_TJD, const at::Tensor& k_SD,
                                         const at::Tensor& w_TJ, const at::Tensor& start_T, const at::Tensor& end_T) {
  const auto acc = accumulation_type(q_TJD);
  const int64_t T = q_TJD.size(0), J = q_TJD.size(1), D = q_TJD.size(2), S = k_SD.size(0);
  const KeyRanges ranges(start_T, end_T, T, S);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto options = q_TJD.options().dtype(acc);
  const at::Tensor k = k_SD.to(acc);
  IndexerGradients out{at::zeros({T, J, D}, options), at::zeros({S, D}, options), at::zeros({T, J}, options)};
  // Blocks in order: their sums into dk are in a fixed order. The products inside are large enough for all threads.
  for (const RowBlock& block : row_blocks(ranges, std::max<int64_t>(1, kBackwardElements / (J * std::max<int64_t>(S, 1))))) {
    const int64_t B = block.row_end - block.row_begin, X = block.key_end - block.key_begin;
    if (X == 0) continue;
    const at::Tensor q_BJD = q_TJD.narrow(0, block.row_begin, B).to(acc);
    const at::Tensor w_BJ1 = w_TJ.narrow(0, block.row_begin, B).to(acc).unsqueeze(2);
    const at::Tensor k_XD = k.narrow(0, block.key_begin, X);
    const at::Tensor dI_BX = dI_TS.narrow(0, block.row_begin, B).narrow(1, block.key_begin, X).to(acc, false, /*copy=*/true);
    fill_outside(dI_BX, block, ranges, 0);
    const at::Tensor r_BJX = relu_scores(q_BJD.reshape({B * J, D}), k_XD).view({B, J, X});
    out.dw_TJ.narrow(0, block.row_begin, B).copy_(at::bmm(r_BJX, dI_BX.unsqueeze(2)).squeeze(2));
    r_BJX.sign_().mul_(dI_BX.unsqueeze(1));  // g / w
    const at::Tensor g_MX = r_BJX.view({B * J, X});
    out.dq_TJD.narrow(0, block.row_begin, B).copy_(at::mm(g_MX, k_XD).view({B, J, D}).mul_(w_BJ1));
    out.dk_SD.narrow(0, block.key_begin, X).addmm_(g_MX.t(), (q_BJD * w_BJ1).view({B * J, D}));
  }
  return out;
}

at::Tensor indexer_logits_selected(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ,
                                   const at::Tensor& indices_TK) {
  const auto acc = accumulation_type(q_TJD);
  const int64_t T = q_TJD.size(0), J = q_TJD.size(1), K = indices_TK.size(1);
  const at::Tensor k = k_SD.to(acc).contiguous();
  at::Tensor logits_TK = at::empty({T, K}, q_TJD.options().dtype(acc));
  const int64_t group = selected_rows(T, J, K, q_TJD.device());
  for_each_block((T + group - 1) / group, q_TJD.device(), [&](int64_t i) {
    const int64_t t = i * group, B = std::min(group, T - t);
    const at::Tensor index_BK = indices_TK.narrow(0, t, B);
    const at::Tensor r_BJK = gathered_dots(q_TJD.narrow(0, t, B).to(acc), k, index_BK).relu_();
    const at::Tensor I_BK = at::bmm(w_TJ.narrow(0, t, B).to(acc).unsqueeze(1), r_BJK).squeeze(1);
    logits_TK.narrow(0, t, B).copy_(I_BK.masked_fill_(index_BK < 0, kMinusInfinity));
  });
  return logits_TK;
}

IndexerGradients indexer_logits_selected_backward(const at::Tensor& dI_TK, const at::Tensor& q_TJD,
                                                  const at::Tensor& k_SD, const at::Tensor& w_TJ,
                                                  const at::Tensor& indices_TK) {
  const auto acc = accumulation_type(q_TJD);
  const int64_t T = q_TJD.size(0), J = q_TJD.size(1), D = q_TJD.size(2), S = k_SD.size(0), K = indices_TK.size(1);
  const auto options = q_TJD.options().dtype(acc);
  const at::Tensor k = k_SD.to(acc).contiguous();
  IndexerGradients out{at::empty({T, J, D}, options), at::zeros({S, D}, options), at::empty({T, J}, options)};
  const int64_t group = selected_rows(T, J, K, q_TJD.device());
  const int64_t outer = std::clamp<int64_t>(at::get_num_threads() * kFactorElements / std::max<int64_t>(J * (K + D), 1), group, std::max(T, group));
  for (int64_t first = 0; first < T; first += outer) {
    const int64_t rows = std::min(outer, T - first);
    const at::Tensor g_RJK = at::empty({rows, J, K}, options), wq_RJD = at::empty({rows, J, D}, options);
    for_each_block((rows + group - 1) / group, q_TJD.device(), [&](int64_t i) {
      const int64_t r = i * group, t = first + r, B = std::min(group, rows - r);
      const at::Tensor index_BK = indices_TK.narrow(0, t, B), q_BJD = q_TJD.narrow(0, t, B).to(acc);
      const at::Tensor w_BJ1 = w_TJ.narrow(0, t, B).to(acc).unsqueeze(2);
      const at::Tensor dI_BK = dI_TK.narrow(0, t, B).to(acc).masked_fill(index_BK < 0, 0);
      const at::Tensor r_BJK = gathered_dots(q_BJD, k, index_BK).relu_();
      out.dw_TJ.narrow(0, t, B).copy_(at::bmm(r_BJK, dI_BK.unsqueeze(2)).squeeze(2));
      const at::Tensor g_BJK = g_RJK.narrow(0, r, B);
      g_BJK.copy_(r_BJK.sign_().mul_(dI_BK.unsqueeze(1)));
      out.dq_TJD.narrow(0, t, B).copy_(gathered_sums(g_BJK, k, index_BK, D).mul_(w_BJ1));
      wq_RJD.narrow(0, r, B).copy_(q_BJD * w_BJ1);
    });
    add_outer_products(out.dk_SD, g_RJK, wq_RJD, indices_TK.narrow(0, first, rows));
  }
  return out;
}

}  // namespace dsa::reference
