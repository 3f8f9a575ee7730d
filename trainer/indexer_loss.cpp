// N own rows, B rows of a block, S stream keys, H heads, J indexer heads, K selected keys
#include "trainer/indexer_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <limits>

#include "kernels/indexer_kl/indexer_kl.h"
#include "kernels/indexer_kl/native.h"
#include "kernels/indexer_logits/indexer_logits.h"
#include "kernels/dense_mla/dense_mla.h"
#include "kernels/native.h"

namespace dsa {
namespace {

double total(const at::Tensor& x) { return x.to(at::kDouble).sum().item<double>(); }

// Accumulates block gradients.
struct ProjectionGradient {
  const IndexerProjection& p;
  at::Tensor dq_NJD, dk_SD, dw_NJ;

  explicit ProjectionGradient(const IndexerProjection& projection) : p(projection) {
    const auto options = p.w_NJ.options().requires_grad(false);
    dq_NJD = at::zeros(p.q_NJD.sizes(), options);
    dk_SD = at::zeros(p.k_SD.sizes(), options);
    dw_NJ = at::zeros(p.w_NJ.sizes(), options);
  }
  void add(const IndexerGradients& g, int64_t row, int64_t rows, KeyRange keys) {
    dq_NJD.narrow(0, row, rows).add_(g.dq_TJD);
    dk_SD.narrow(0, keys.first, keys.count).add_(g.dk_SD);
    dw_NJ.narrow(0, row, rows).add_(g.dw_TJ);
  }
};

// Sends gradients through the projections into the parameters.
void project_back(const IndexerProjection& p, const at::Tensor& dq_NJD, const at::Tensor& dk_SD, const at::Tensor& dw_NJ) {
  torch::autograd::backward({p.q_NJD, p.k_SD, p.w_NJ}, {dq_NJD.to(p.q_NJD.scalar_type()), dk_SD.to(p.k_SD.scalar_type()),
                                                        dw_NJ.to(p.w_NJ.scalar_type())});
}

// Adds the sums over the rows that count.
void report_rows(LayerReport& report, const at::Tensor& kl_N, const at::Tensor& entropy_N, const at::Tensor& real_N) {
  const at::Tensor sums = at::stack({kl_N * real_N, entropy_N * real_N, real_N}).to(at::kDouble).sum(1).cpu();
  report.kl += sums[0].item<double>();
  report.entropy += sums[1].item<double>();
  report.kl_rows += sums[2].item<double>();
}

void record(const ForwardPass& pass, const std::string& name, int64_t layer, std::vector<at::Tensor> blocks) {
  if (pass.recorder) pass.recorder->rows_N[name + "." + std::to_string(layer) + ".rows"] = at::cat(blocks);
}

// Adds the share of the full attention's mass that the selected keys hold, on the sample rows.
void measure_recall(const IndexerLossTarget& target, const TopK& selection, const LatentQueries& latent_queries,
                    const at::Tensor& kv_SE, const ForwardPass& pass) {
  LayerReport& report = pass.report.layers[target.layer];
  const TokenBatch& b = pass.batch;
  const auto longs = b.start_N.options();
  at::Tensor sum = at::zeros({}, longs.dtype(at::kDouble));
  for (int64_t sequence = 0; sequence < b.sequences; ++sequence) {
    const at::Tensor& rows = b.sample_rows_B[sequence];
    const int64_t sampled = rows.size(0), first = sequence * b.length;
    if (sampled == 0) continue;
    const at::Tensor q_RHE = latent_queries(rows), kv_TE = kv_SE.narrow(0, first, b.length);
    at::Tensor s_RHT = wide_mm(q_RHE.flatten(0, 1), kv_TE.t()).view({sampled, -1, b.length}) * target.scale;
    const at::Tensor key = at::arange(first, first + b.length, longs).unsqueeze(0);
    const at::Tensor hidden = (key < b.start_N.index_select(0, rows).unsqueeze(1))
                                  .logical_or(key >= b.end_N.index_select(0, rows).unsqueeze(1));
    s_RHT.masked_fill_(hidden.unsqueeze(1), -std::numeric_limits<double>::infinity());
    const at::Tensor p_RT = s_RHT.softmax(2).sum(1) / static_cast<double>(target.all_heads);
    const at::Tensor picked = selection.indices_TK.index_select(0, rows).to(at::kLong);
    sum += (p_RT.gather(1, (picked - first).clamp_min(0)) * (picked >= 0)).to(at::kDouble).sum();
    report.recall_rows += static_cast<double>(sampled);
  }
  report.recall += sum.item<double>();
}

}  // namespace

void dense_indexer_loss(const IndexerLossTarget& target, const IndexerProjection& projection, const at::Tensor& q_NHD,
                        const at::Tensor& k_SHD, const at::Tensor& lse_NH, const ForwardPass& pass) {
  const IndexerProjection p{projection.q_NJD.detach(), projection.k_SD.detach(), projection.w_NJ.detach()};
  const bool learns = projection.q_NJD.requires_grad();
  LayerReport& report = pass.report.layers[target.layer];
  const TokenBatch& b = pass.batch;
  const native::IndexerInputs inputs{p.q_NJD, p.k_SD, p.w_NJ};
  const char* why_not = nullptr;
  if (native::indexer_kl_dense_supports(q_NHD, inputs, &why_not)) {
    ran("indexer_kl_dense", "sm90");
    native::IndexerLoss loss;
    {
      const c10::NoGradGuard no_grad;
      loss = native::indexer_kl_dense(q_NHD, k_SHD, lse_NH, target.scale, inputs, b.start_N, b.end_N, target.top_k, b.real_N,
                                      pass.plan.kl_scale, learns);
      report_rows(report, loss.kl_T, loss.entropy_T, b.real_N);
      report.recall += total(loss.recall_T * b.real_N);
      report.recall_rows += total(b.real_N);
    }
    record(pass, "warmup", target.layer, {loss.kl_T});
    if (learns) project_back(projection, loss.gradients.dq_TJD, loss.gradients.dk_SD, loss.gradients.dw_TJ);
    return;
  }
  ran("indexer_kl_dense", std::string("reference (") + why_not + ")");
  ProjectionGradient gradient(projection);
  const int64_t own = p.q_NJD.size(0);
  std::vector<at::Tensor> recorded;
  {
    const c10::NoGradGuard no_grad;
    for (int64_t i = 0; i < own; i += pass.plan.query_block) {
      const int64_t n = std::min(pass.plan.query_block, own - i);
      const auto rows = [&](const at::Tensor& x_N) { return x_N.narrow(0, i, n); };
      const KeyRange keys = key_range(rows(b.start_N), rows(b.end_N));
      const at::Tensor start = rows(b.start_N) - keys.first, end = rows(b.end_N) - keys.first, real = rows(b.real_N);
      const at::Tensor p_BS = attention_mass(rows(q_NHD), k_SHD.narrow(0, keys.first, keys.count), rows(lse_NH), start, end,
                                             target.scale) / static_cast<double>(target.all_heads);
      const at::Tensor q = rows(p.q_NJD), w = rows(p.w_NJ), k = p.k_SD.narrow(0, keys.first, keys.count);
      const at::Tensor scores = indexer_logits(q, k, w, start, end);
      const KlRows kl = indexer_kl(scores, p_BS, learns);
      report_rows(report, kl.rows_T, kl.entropy_prediction_T, real);
      report.recall += total(captured_mass(p_BS, topk_select(scores, target.top_k)) * real);
      report.recall_rows += total(real);
      recorded.push_back(kl.rows_T);
      if (learns)
        gradient.add(indexer_logits_backward(kl.gradient_TX * (real * pass.plan.kl_scale).unsqueeze(1), q, k, w, start, end), i,
                     n, keys);
    }
  }
  record(pass, "warmup", target.layer, std::move(recorded));
  if (learns) project_back(projection, gradient.dq_NJD, gradient.dk_SD, gradient.dw_NJ);
}

void sparse_indexer_loss(const IndexerLossTarget& target, const IndexerProjection& projection, const TopK& selection,
                         const at::Tensor& mass_NK, const LatentQueries& latent_queries, const at::Tensor& kv_SE,
                         const ForwardPass& pass) {
  const IndexerProjection p{projection.q_NJD.detach(), projection.k_SD.detach(), projection.w_NJ.detach()};
  const bool learns = projection.q_NJD.requires_grad();
  LayerReport& report = pass.report.layers[target.layer];
  const TokenBatch& b = pass.batch;
  const int64_t own = p.q_NJD.size(0);
  at::Tensor p_NK;
  {
    const c10::NoGradGuard no_grad;
    p_NK = mass_NK / static_cast<double>(target.all_heads);
    measure_recall(target, selection, latent_queries, kv_SE, pass);
  }
  const native::IndexerInputs inputs{p.q_NJD, p.k_SD, p.w_NJ};
  const char* why_not = "nothing learns";
  if (learns && native::indexer_kl_sparse_supports(inputs, selection, &why_not)) {
    ran("indexer_kl_sparse", "sm90");
    native::IndexerLoss loss;
    {
      const c10::NoGradGuard no_grad;
      loss = native::indexer_kl_sparse(p_NK, selection, inputs, b.real_N, pass.plan.kl_scale, target.layer);
      report_rows(report, loss.kl_T, loss.entropy_T, b.real_N);
    }
    record(pass, "sparse", target.layer, {loss.kl_T});
    project_back(projection, loss.gradients.dq_TJD, loss.gradients.dk_SD, loss.gradients.dw_TJ);
    return;
  }
  ran("indexer_kl_sparse", std::string("reference (") + why_not + ")");
  ProjectionGradient gradient(projection);
  std::vector<at::Tensor> recorded;
  {
    const c10::NoGradGuard no_grad;
    for (int64_t i = 0; i < own; i += pass.plan.query_block) {
      const int64_t n = std::min(pass.plan.query_block, own - i);
      const at::Tensor q = p.q_NJD.narrow(0, i, n), w = p.w_NJ.narrow(0, i, n), indices = selection.indices_TK.narrow(0, i, n);
      const KlRows kl = indexer_kl(indexer_logits_selected(q, p.k_SD, w, indices), p_NK.narrow(0, i, n), learns);
      const at::Tensor real = b.real_N.narrow(0, i, n);
      report_rows(report, kl.rows_T, kl.entropy_prediction_T, real);
      recorded.push_back(kl.rows_T);
      if (learns)
        gradient.add(indexer_logits_selected_backward(kl.gradient_TX * (real * pass.plan.kl_scale).unsqueeze(1), q, p.k_SD,
                                                      w, indices), i, n, {0, p.k_SD.size(0)});
    }
  }
  record(pass, "sparse", target.layer, std::move(recorded));
  if (learns) project_back(projection, gradient.dq_NJD, gradient.dk_SD, gradient.dw_NJ);
}

}  // namespace dsa
