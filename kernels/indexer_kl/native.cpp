#include "kernels/indexer_kl/native.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/indexer_kl/dense_params.h"
#include "kernels/indexer_kl/sparse_params.h"
#include "kernels/native.h"
#include "kernels/quantum.h"

namespace dsa::native {
namespace {

constexpr size_t kMostWorkspace = size_t{11} << 28;  // 2.75 GiB
constexpr int64_t kMostRows = 4096, kRowStep = 256;  // of a block

QuantumGuesses quantum;

const char* refusal(const IndexerInputs& x) {
  if (!x.q_TJI.is_cuda()) return "not on a GPU";
  if (x.q_TJI.scalar_type() != at::kBFloat16) return "the kernels take bf16";
  if (x.q_TJI.size(2) != 128 || x.q_TJI.size(1) > 64) return "indexers other than up to 64 heads of 128";
  if (x.q_TJI.size(0) == 0) return "no rows";
  return nullptr;
}

// Contiguous, in the dtypes of the kernels; alive as long as a launch is described.
struct Inputs {
  at::Tensor q, k, w;
  explicit Inputs(const IndexerInputs& x)
      : q(x.q_TJI.contiguous()), k(x.k_SI.contiguous()), w(x.w_TJ.to(at::kFloat).contiguous()) {}
};

// The attention whose mass is the target, all but the workspace.
struct Attention {
  at::Tensor q, k, lse, start, end;
  AttentionMassParams params;
  Attention(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& lse_TH, double scale,
            const at::Tensor& start_T, const at::Tensor& end_T)
      : q(q_THD.stride(2) == 1 ? q_THD : q_THD.contiguous()),
        k(k_SHD.contiguous()),
        lse(lse_TH.to(at::kFloat)),
        start(start_T.to(at::kInt).contiguous()),
        end(end_T.to(at::kInt).contiguous()) {
    AttentionMassParams& a = params;
    a.queries = q.size(0);
    a.keys = k.size(0);
    a.heads = static_cast<int>(q.size(1));
    a.scale = static_cast<float>(scale);
    a.q = q.const_data_ptr();
    a.q_stride = q.stride(0);
    a.q_head_stride = q.stride(1);
    a.k = k.const_data_ptr();
    a.k_stride = a.k_rope_stride = k.stride(0);
    a.k_head_stride = k.stride(1);
    a.k_rope = static_cast<const char*>(a.k) + 128 * k.element_size();
    a.lse = lse.const_data_ptr<float>();
    a.lse_stride = lse.stride(0);
    a.lse_head_stride = lse.stride(1);
    a.start = start.const_data_ptr<int32_t>();
    a.end = end.const_data_ptr<int32_t>();
    a.stream = current_stream(q);
  }
};

at::Tensor bytes_on(at::Device device, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte).device(device));
}

IndexerGradients gradients_like(const Inputs& x) {
  return {at::empty_like(x.q), at::zeros(x.k.sizes(), x.w.options()), at::empty_like(x.w)};
}

}  // namespace

bool indexer_kl_dense_supports(const at::Tensor& q_THD, const IndexerInputs& indexer, const char** why_not) {
  *why_not = refusal(indexer);
  if (!*why_not && (q_THD.scalar_type() != at::kBFloat16 || q_THD.size(2) != 192)) *why_not = "attention heads other than 128 + 64 in bf16";
  return !*why_not;
}

IndexerLoss indexer_kl_dense(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& lse_TH, double scale,
                             const IndexerInputs& indexer, const at::Tensor& start_T, const at::Tensor& end_T, int64_t top_k,
                             const at::Tensor& row_weight_T, double loss_scale, bool want_gradient) {
  const Attention attention(q_THD, k_SHD, lse_TH, scale, start_T, end_T);
  IndexerKlDenseParams p;
  p.attention = attention.params;
  p.rows.all_heads = attention.params.heads;
  const Inputs x(indexer);
  const at::Tensor weight = row_weight_T.to(at::kFloat).contiguous();
  const int64_t T = p.attention.queries;
  IndexerLoss out{at::empty({T}, x.w.options()), at::empty({T}, x.w.options()), at::empty({T}, x.w.options()), {}};
  p.scores.dtype = IndexerDtype::BF16;
  p.scores.heads = p.gradient.heads = static_cast<int>(x.q.size(1));
  p.scores.dim = p.gradient.dim = 128;
  p.scores.q = p.gradient.q = x.q.const_data_ptr();
  p.scores.q_stride = p.gradient.q_stride = x.q.stride(0);
  p.scores.k = p.gradient.k = x.k.const_data_ptr();
  p.scores.k_stride = p.gradient.k_stride = x.k.stride(0);
  p.scores.w = p.gradient.w = x.w.const_data_ptr<float>();
  p.scores.w_stride = p.gradient.w_stride = x.w.stride(0);
  if (want_gradient) {
    out.gradients = gradients_like(x);
    p.gradient.dq = out.gradients.dq_TJD.data_ptr();
    p.gradient.dw = out.gradients.dw_TJ.data_ptr<float>();
    p.gradient.dk = out.gradients.dk_SD.data_ptr<float>();
  }
  p.rows.row_weight = weight.const_data_ptr<float>();
  p.rows.loss_scale = static_cast<float>(loss_scale);
  p.rows.kl = out.kl_T.data_ptr<float>();
  p.rows.entropy_prediction = out.entropy_T.data_ptr<float>();
  p.rows.recall = out.recall_T.data_ptr<float>();
  p.top_k = static_cast<int>(top_k);

  int64_t rows = std::min((T + kRowStep - 1) / kRowStep * kRowStep, kMostRows);
  while (rows > kRowStep && indexer_kl_dense_workspace_bytes(p, rows) > kMostWorkspace) rows -= kRowStep;
  p.workspace_bytes = indexer_kl_dense_workspace_bytes(p, rows);
  const at::Tensor workspace = bytes_on(x.q.device(), p.workspace_bytes);
  p.workspace = workspace.data_ptr();
  launch_indexer_kl_dense_sm90(p);
  return out;
}

bool indexer_kl_sparse_supports(const IndexerInputs& indexer, const TopK& selected, const char** why_not) {
  const int64_t top_k = selected.indices_TK.size(1);
  *why_not = refusal(indexer);
  if (!*why_not && (top_k % 64 || top_k > 4096)) *why_not = "top_k must be a multiple of 64, at most 4096";
  if (!*why_not && !selected.scores_TK.defined()) *why_not = "the selection left no scores";
  return !*why_not;
}

IndexerLoss indexer_kl_sparse(const at::Tensor& p_TK, const TopK& selected, const IndexerInputs& indexer,
                              const at::Tensor& row_weight_T, double loss_scale, int64_t site) {
  const Inputs x(indexer);
  const at::Tensor target = p_TK.contiguous(), indices = selected.indices_TK.contiguous(), lengths = selected.lengths_T.contiguous();
  const at::Tensor scores = selected.scores_TK.contiguous(), weight = row_weight_T.to(at::kFloat).contiguous();
  const int64_t T = x.q.size(0), S = x.k.size(0);
  IndexerLoss out{at::empty({T}, x.w.options()), at::empty({T}, x.w.options()), {}, gradients_like(x)};
  const int64_t sum_bytes = indexer_kl_sparse_sum_bytes(S);
  const at::Tensor sum = bytes_on(x.q.device(), static_cast<size_t>(sum_bytes)), report = bytes_on(x.q.device(), sizeof(QuantumReport));
  IndexerKlSparseParams p;
  p.queries = T;
  p.keys = S;
  p.heads = static_cast<int>(x.q.size(1));
  p.k = static_cast<int>(indices.size(1));
  p.q = x.q.const_data_ptr();
  p.q_stride = x.q.stride(0);
  p.key = x.k.const_data_ptr();
  p.k_stride = x.k.stride(0);
  p.w = x.w.const_data_ptr<float>();
  p.w_stride = x.w.stride(0);
  p.indices = indices.const_data_ptr<int32_t>();
  p.indices_stride = indices.stride(0);
  p.lengths = lengths.const_data_ptr<int32_t>();
  p.p_sel = target.const_data_ptr<float>();
  p.p_stride = target.stride(0);
  p.loss_scale = static_cast<float>(loss_scale);
  p.row_weight = weight.const_data_ptr<float>();
  p.kl = out.kl_T.data_ptr<float>();
  p.entropy_prediction = out.entropy_T.data_ptr<float>();
  p.dq = out.gradients.dq_TJD.data_ptr();
  p.dw = out.gradients.dw_TJ.data_ptr<float>();
  p.scores = scores.const_data_ptr<float>();
  p.scores_stride = scores.stride(0);
  p.dk_sum = reinterpret_cast<uint64_t*>(sum.data_ptr());
  p.workspace_bytes = indexer_kl_sparse_workspace_bytes();
  const at::Tensor workspace = bytes_on(x.q.device(), p.workspace_bytes);
  p.workspace = workspace.data_ptr();
  p.stream = current_stream(x.q);
  const bool finite = quantum.run(site, [&](float q) {
    sum.zero_();
    p.quantum = q;
    launch_indexer_kl_sparse_sm90(p);
    auto* const on_device = reinterpret_cast<QuantumReport*>(report.data_ptr());
    launch_indexer_kl_sparse_finish_sm90(p.dk_sum, S, q, out.gradients.dk_SD.data_ptr(), /*bf16=*/false, on_device, p.stream);
    QuantumReport seen;
    std::memcpy(&seen, report.cpu().const_data_ptr(), sizeof seen);
    return seen;
  });
  if (!finite) out.gradients.dk_SD.fill_(std::numeric_limits<float>::quiet_NaN());
  return out;
}

}  // namespace dsa::native
