// A few query rows at a time, products with the listed keys by gathered_rows.
// dkv is a sum over query rows: the factors [ds ; p] and [q ; do|0] of all rows of a block are kept, and
// add_outer_products adds them key by key in the order of the rows.
// Letters as in sparse_mla.h; B rows of a tile [B,H,K], R rows of a block, M = 2H.
#include "kernels/sparse_mla/reference.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "kernels/gathered_rows/gathered_rows.h"
#include "kernels/packed/packed.h"

namespace dsa::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kTileElements = 32 << 10;   // B*H*K of one thread on the CPU: stays in its cache
constexpr int64_t kFactorElements = 1 << 20;  // R*M*(K+E) a thread between the two halves of the backward pass: in L3

int64_t tile_rows(const at::Tensor& q_THE, int64_t K, int64_t query_block) {
  if (!q_THE.is_cpu()) return query_block;
  return std::clamp<int64_t>(kTileElements / std::max<int64_t>(q_THE.size(1) * K, 1), 1, query_block);
}

// The lists of B rows from t on, -1 where they have ended.
at::Tensor lists(const at::Tensor& indices_TK, const at::Tensor& lengths_T, int64_t t, int64_t B) {
  const at::Tensor place_K = at::arange(indices_TK.size(1), lengths_T.options());
  return indices_TK.narrow(0, t, B).masked_fill(place_K.unsqueeze(0) >= lengths_T.narrow(0, t, B).unsqueeze(1), -1);
}

}  // namespace

SparseMlaOutput sparse_mla_forward(const at::Tensor& q_THE, const at::Tensor& kv_SE, const at::Tensor& indices_TK,
                                   const at::Tensor& lengths_T, double scale, int64_t latent, int64_t query_block,
                                   bool want_mass) {
  const auto acc = accumulation_type(q_THE);
  const int64_t T = q_THE.size(0), H = q_THE.size(1), K = indices_TK.size(1);
  const auto options = q_THE.options().dtype(acc);
  const at::Tensor kv = kv_SE.to(acc).contiguous();
  SparseMlaOutput out{at::zeros({T, H, latent}, q_THE.options()), at::empty({T, H}, options).fill_(-kInfinity),
                      want_mass ? at::zeros({T, K}, options) : at::Tensor()};
  if (K == 0 || kv.size(0) == 0) return out;
  const int64_t group = tile_rows(q_THE, K, query_block);
  for_each_block((T + group - 1) / group, q_THE.device(), [&](int64_t i) {
    const int64_t t = i * group, B = std::min(group, T - t);
    const at::Tensor index_BK = lists(indices_TK, lengths_T, t, B);
    const at::Tensor p_BHK = gathered_dots(q_THE.narrow(0, t, B).to(acc), kv, index_BK).mul_(scale);
    p_BHK.masked_fill_((index_BK < 0).unsqueeze(1), -kInfinity);
    const at::Tensor max_BH1 = p_BHK.amax(2, true).clamp_min_(std::numeric_limits<float>::lowest());
    p_BHK.sub_(max_BH1).exp_();
    const at::Tensor sum_BH1 = p_BHK.sum(2, true);
    out.lse_TH.narrow(0, t, B).copy_((sum_BH1.log() + max_BH1).squeeze(2));
    p_BHK.div_(sum_BH1.clamp_min(std::numeric_limits<float>::min()));
    out.o_THC.narrow(0, t, B).copy_(gathered_sums(p_BHK, kv, index_BK, latent));
    if (want_mass) out.mass_TK.narrow(0, t, B).copy_(p_BHK.sum(1));
  });
  return out;
}

SparseMlaGradients sparse_mla_backward(const at::Tensor& do_THC, const at::Tensor& q_THE, const at::Tensor& kv_SE,
                                       const at::Tensor& indices_TK, const at::Tensor& lengths_T,
                                       const at::Tensor& o_THC, const at::Tensor& lse_TH, double scale, int64_t latent,
                                       int64_t query_block) {
  const auto acc = accumulation_type(q_THE);
  const int64_t T = q_THE.size(0), H = q_THE.size(1), E = q_THE.size(2), K = indices_TK.size(1);
  const auto options = q_THE.options().dtype(acc);
  const at::Tensor kv = kv_SE.to(acc).contiguous();
  const at::Tensor dkv_SE = at::zeros(kv.sizes(), options);
  const at::Tensor dq_THE = at::zeros({T, H, E}, q_THE.options()), mass_TK = at::zeros({T, K}, options);
  if (K == 0 || kv.size(0) == 0) return {dq_THE, dkv_SE.to(kv_SE.scalar_type()), mass_TK};
  const int64_t group = tile_rows(q_THE, K, query_block);
  const int64_t block = std::clamp<int64_t>(at::get_num_threads() * kFactorElements / (2 * H * (K + E)), group, std::max(T, group));
  for (int64_t first = 0; first < T; first += block) {
    const int64_t R = std::min(block, T - first);
    const at::Tensor left_RMK = at::empty({R, 2 * H, K}, options);   // [scale ds ; p]
    const at::Tensor right_RME = at::zeros({R, 2 * H, E}, options);  // [q ; do|0]
    const at::Tensor index_RK = at::empty({R, K}, indices_TK.options());
    for_each_block((R + group - 1) / group, q_THE.device(), [&](int64_t i) {
      const int64_t r = i * group, t = first + r, B = std::min(group, R - r);
      const at::Tensor index_BK = lists(indices_TK, lengths_T, t, B);
      const at::Tensor q_BHE = right_RME.narrow(0, r, B).narrow(1, 0, H);
      const at::Tensor do_BHC = right_RME.narrow(0, r, B).narrow(1, H, H).narrow(2, 0, latent);
      q_BHE.copy_(q_THE.narrow(0, t, B));
      do_BHC.copy_(do_THC.narrow(0, t, B));
      index_RK.narrow(0, r, B).copy_(index_BK);

      const at::Tensor p_BHK = gathered_dots(q_BHE, kv, index_BK).mul_(scale);
      // A row without keys has lse = -inf; with +inf in its place every p becomes 0.
      const at::Tensor lse_BH1 = lse_TH.narrow(0, t, B).unsqueeze(2);
      p_BHK.sub_(lse_BH1.masked_fill(lse_BH1 == -kInfinity, kInfinity)).exp_();
      p_BHK.masked_fill_((index_BK < 0).unsqueeze(1), 0);
      mass_TK.narrow(0, t, B).copy_(p_BHK.sum(1));
      const at::Tensor delta_BH1 = (do_BHC * o_THC.narrow(0, t, B)).sum(2, true);
      const at::Tensor ds_BHK = gathered_dots(do_BHC, kv, index_BK);
      ds_BHK.sub_(delta_BH1).mul_(p_BHK).mul_(scale);
      dq_THE.narrow(0, t, B).copy_(gathered_sums(ds_BHK, kv, index_BK, E));
      left_RMK.narrow(0, r, B).narrow(1, 0, H).copy_(ds_BHK);
      left_RMK.narrow(0, r, B).narrow(1, H, H).copy_(p_BHK);
    });
    add_outer_products(dkv_SE, left_RMK, right_RME, index_RK);
  }
  return {dq_THE, dkv_SE.to(kv_SE.scalar_type()), mass_TK};
}

}  // namespace dsa::reference
