// One (row block, head) at a time: s = q k^T over the block's keys, masked on its ragged edge, softmax in place.
// The backward pass gives every head to one thread, which walks the row blocks in order and owns dk and dv of it.
// Letters as in dense_mla.h; B rows of a block, X its keys.
#include "kernels/dense_mla/reference.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "kernels/native.h"
#include "kernels/packed/packed.h"

namespace dsa::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kMassRows = 32;  // rows of a tile of attention_mass

// Rows [first, first + count) of one head: [count, width], in the accumulation dtype.
at::Tensor head_rows(const at::Tensor& x_NHW, int64_t head, int64_t first, int64_t count, at::ScalarType acc) {
  return x_NHW.select(1, head).narrow(0, first, count).to(acc);
}

// exp(scale q k^T - lse), 0 outside the ranges. lse_B1 = -inf marks rows without keys.
at::Tensor probabilities(const at::Tensor& q_BD, const at::Tensor& k_XD, const at::Tensor& lse_B1, double scale,
                         const RowBlock& block, const KeyRanges& ranges) {
  const at::Tensor p_BX = wide_mm(q_BD, k_XD.t()).mul_(scale);
  fill_outside(p_BX, block, ranges, -kInfinity);
  return p_BX.sub_(lse_B1.masked_fill(lse_B1 == -kInfinity, kInfinity)).exp_();
}

}  // namespace

DenseMlaOutput dense_mla_forward(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& v_SHV,
                                 const at::Tensor& start_T, const at::Tensor& end_T, double scale, int64_t query_block) {
  const auto acc = accumulation_type(q_THD);
  const int64_t T = q_THD.size(0), H = q_THD.size(1);
  const KeyRanges ranges(start_T, end_T, T, k_SHD.size(0));
  const auto blocks = row_blocks(ranges, query_block);
  DenseMlaOutput out{at::zeros({T, H, v_SHV.size(2)}, q_THD.options()),
                     at::empty({T, H}, q_THD.options().dtype(acc)).fill_(-kInfinity)};
  for_each_block(blocks.size() * H, q_THD.device(), [&](int64_t i) {
    const RowBlock& block = blocks[i / H];
    const int64_t h = i % H, B = block.row_end - block.row_begin, X = block.key_end - block.key_begin;
    if (X == 0) return;
    const at::Tensor q_BD = head_rows(q_THD, h, block.row_begin, B, acc);
    const at::Tensor p_BX = at::mm(q_BD * scale, head_rows(k_SHD, h, block.key_begin, X, acc).t());
    fill_outside(p_BX, block, ranges, -kInfinity);
    const at::Tensor max_B1 = p_BX.amax(1, true).clamp_min_(std::numeric_limits<float>::lowest());
    p_BX.sub_(max_B1).exp_();
    const at::Tensor sum_B1 = p_BX.sum(1, true);
    out.lse_TH.select(1, h).narrow(0, block.row_begin, B).copy_((sum_B1.log() + max_B1).squeeze(1));
    const at::Tensor o_BV = at::mm(p_BX, head_rows(v_SHV, h, block.key_begin, X, acc));
    out.o_THV.select(1, h).narrow(0, block.row_begin, B).copy_(o_BV.div_(sum_B1.clamp_min(std::numeric_limits<float>::min())));
  });
  return out;
}

DenseMlaGradients dense_mla_backward(const at::Tensor& do_THV, const at::Tensor& q_THD, const at::Tensor& k_SHD,
                                     const at::Tensor& v_SHV, const at::Tensor& start_T, const at::Tensor& end_T,
                                     const at::Tensor& o_THV, const at::Tensor& lse_TH, double scale,
                                     int64_t query_block) {
  const auto acc = accumulation_type(q_THD);
  const int64_t T = q_THD.size(0), H = q_THD.size(1), D = q_THD.size(2), S = k_SHD.size(0), V = v_SHV.size(2);
  const KeyRanges ranges(start_T, end_T, T, S);
  const auto blocks = row_blocks(ranges, query_block);
  DenseMlaGradients out{at::zeros({T, H, D}, q_THD.options()), at::empty({S, H, D}, k_SHD.options()),
                        at::empty({S, H, V}, v_SHV.options())};
  for_each_block(H, q_THD.device(), [&](int64_t h) {
    const at::Tensor dk_SD = at::zeros({S, D}, q_THD.options().dtype(acc));
    const at::Tensor dv_SV = at::zeros({S, V}, q_THD.options().dtype(acc));
    for (const RowBlock& block : blocks) {
      const int64_t B = block.row_end - block.row_begin, X = block.key_end - block.key_begin;
      if (X == 0) continue;
      const at::Tensor q_BD = head_rows(q_THD, h, block.row_begin, B, acc);
      const at::Tensor k_XD = head_rows(k_SHD, h, block.key_begin, X, acc);
      const at::Tensor do_BV = head_rows(do_THV, h, block.row_begin, B, acc);
      const at::Tensor lse_B1 = lse_TH.select(1, h).narrow(0, block.row_begin, B).unsqueeze(1);
      const at::Tensor delta_B1 = (do_BV * head_rows(o_THV, h, block.row_begin, B, acc)).sum(1, true);
      const at::Tensor p_BX = probabilities(q_BD, k_XD, lse_B1, scale, block, ranges);
      dv_SV.narrow(0, block.key_begin, X).addmm_(p_BX.t(), do_BV);
      const at::Tensor ds_BX = at::mm(do_BV, head_rows(v_SHV, h, block.key_begin, X, acc).t());
      ds_BX.sub_(delta_B1).mul_(p_BX);
      out.dq_THD.select(1, h).narrow(0, block.row_begin, B).copy_(at::mm(ds_BX, k_XD).mul_(scale));
      dk_SD.narrow(0, block.key_begin, X).addmm_(ds_BX.t(), q_BD * scale);
    }
    out.dk_SHD.select(1, h).copy_(dk_SD);
    out.dv_SHV.select(1, h).copy_(dv_SV);
  });
  return out;
}

at::Tensor attention_mass(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& lse_TH,
                          const at::Tensor& start_T, const at::Tensor& end_T, double scale) {
  const auto acc = accumulation_type(q_THD);
  const int64_t T = q_THD.size(0), H = q_THD.size(1), S = k_SHD.size(0);
  const KeyRanges ranges(start_T, end_T, T, S);
  // On a GPU one tile is a product large enough for it.
  const auto blocks = row_blocks(ranges, q_THD.is_cpu() ? kMassRows : T);
  const at::Tensor mass_TS = at::zeros({T, S}, q_THD.options().dtype(acc));
  for_each_block(blocks.size(), q_THD.device(), [&](int64_t i) {
    const RowBlock& block = blocks[i];
    const int64_t B = block.row_end - block.row_begin, X = block.key_end - block.key_begin;
    if (X == 0) return;
    const at::Tensor mass_BX = mass_TS.narrow(0, block.row_begin, B).narrow(1, block.key_begin, X);
    for (int64_t h = 0; h < H; ++h) {
      mass_BX.add_(probabilities(q_THD.select(1, h).narrow(0, block.row_begin, B),
                                 k_SHD.select(1, h).narrow(0, block.key_begin, X),
                                 lse_TH.select(1, h).narrow(0, block.row_begin, B).unsqueeze(1), scale, block, ranges));
    }
  });
  return mass_TS;
}

}  // namespace dsa::reference
