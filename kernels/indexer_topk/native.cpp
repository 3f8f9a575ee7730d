#include "kernels/indexer_topk/native.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>

#include <algorithm>

#include "kernels/check.h"
#include "kernels/indexer_topk/params.h"
#include "kernels/native.h"
#include "kernels/topk_select/params.h"

namespace dsa::native {
namespace {

constexpr size_t kMostWorkspace = size_t{1} << 30;

// The tensors a launch reads, alive as long as it is being described.
struct Scores {
  at::Tensor q, k, w, start, end;
  IndexerLogitsParams params;

  Scores(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ, const at::Tensor& start_T,
         const at::Tensor& end_T)
      : q(q_TJD.contiguous()),
        k(k_SD.contiguous()),
        w(w_TJ.to(at::kFloat).contiguous()),
        start(start_T.to(at::kInt).contiguous()),
        end(end_T.to(at::kInt).contiguous()) {
    params.dtype = IndexerDtype::BF16;
    params.queries = q.size(0);
    params.keys = k.size(0);
    params.heads = static_cast<int>(q.size(1));
    params.dim = static_cast<int>(q.size(2));
    params.q = q.const_data_ptr();
    params.q_stride = q.stride(0);
    params.k = k.const_data_ptr();
    params.k_stride = k.stride(0);
    params.w = w.const_data_ptr<float>();
    params.w_stride = w.stride(0);
    params.start = start.const_data_ptr<int32_t>();
    params.end = end.const_data_ptr<int32_t>();
    params.stream = current_stream(q);
  }
};

void refuse_nan(const at::Tensor& nan_counts_T) {
  const at::Tensor rows = nan_counts_T.nonzero();
  require(rows.numel() == 0, "topk_select: row {} holds NaN (a score is not a number) look for overflow before it",
          rows.numel() ? rows[0].item<int64_t>() : 0);
}

}  // namespace

bool indexer_supports(const at::Tensor& q_TJD, const at::Tensor& k_SD, const char** why_not) {
  *why_not = nullptr;
  if (!q_TJD.is_cuda()) *why_not = "not on a GPU";
  else if (q_TJD.scalar_type() != at::kBFloat16 || k_SD.scalar_type() != at::kBFloat16) *why_not = "the kernels take bf16";
  else if (q_TJD.size(1) > 64) *why_not = "more than 64 indexer heads";
  else if (q_TJD.size(2) > 128 || q_TJD.size(2) % 16) *why_not = "an indexer head size over 128 or no multiple of 16";
  else if (q_TJD.size(0) == 0 || k_SD.size(0) == 0) *why_not = "no rows";
  return !*why_not;
}

bool topk_supports(const at::Tensor& logits_TS, int64_t k, const char** why_not) {
  *why_not = nullptr;
  if (!logits_TS.is_cuda()) *why_not = "not on a GPU";
  else if (logits_TS.scalar_type() != at::kFloat) *why_not = "the kernel orders fp32";
  else if (k > 4096) *why_not = "k over 4096";
  else if (logits_TS.numel() == 0) *why_not = "no scores";
  return !*why_not;
}

at::Tensor indexer_logits(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ,
                          const at::Tensor& start_T, const at::Tensor& end_T) {
  Scores s(q_TJD, k_SD, w_TJ, start_T, end_T);
  // Rows of logits stand 16 bytes apart or a multiple of it.
  const int64_t S = k_SD.size(0), stride = (S + 3) / 4 * 4;
  const at::Tensor logits = at::empty({s.params.queries, stride}, s.w.options());
  s.params.logits = logits.data_ptr<float>();
  s.params.logits_stride = stride;
  s.params.fill_outside = true;
  launch_indexer_logits_sm90(s.params);
  return logits.narrow(1, 0, S);
}

TopK topk_select(const at::Tensor& logits_TS, int64_t k) {
  const at::Tensor logits = logits_TS.stride(1) == 1 ? logits_TS : logits_TS.contiguous();
  const auto ints = logits.options().dtype(at::kInt);
  const int64_t T = logits.size(0);
  TopK out{at::empty({T, k}, ints), at::empty({T}, ints), {}};
  const at::Tensor nan_counts = at::empty({T}, ints);
  TopKSelectParams p;
  p.rows = T;
  p.columns = logits.size(1);
  p.k = static_cast<int>(k);
  p.logits = logits.const_data_ptr<float>();
  p.logits_stride = logits.stride(0);
  p.indices = out.indices_TK.data_ptr<int32_t>();
  p.indices_stride = k;
  p.lengths = out.lengths_T.data_ptr<int32_t>();
  p.nan_counts = nan_counts.data_ptr<int32_t>();
  p.stream = current_stream(logits);
  launch_topk_select_sm90(p);
  refuse_nan(nan_counts);
  return out;
}

TopK indexer_topk(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ, const at::Tensor& start_T,
                  const at::Tensor& end_T, int64_t top_k, bool want_scores) {
  const Scores s(q_TJD, k_SD, w_TJ, start_T, end_T);
  const auto ints = s.q.options().dtype(at::kInt);
  const int64_t T = s.params.queries;
  TopK out{at::empty({T, top_k}, ints), at::empty({T}, ints), {}};
  if (want_scores) out.scores_TK = at::empty({T, top_k}, s.w.options());
  const at::Tensor nan_counts = at::empty({T}, ints);
  const IndexerTopKWorkspace need = indexer_topk_workspace_sm90(T, s.params.keys);
  const size_t bytes = std::max(need.least, std::min(need.enough, kMostWorkspace));
  const at::Tensor workspace = at::empty({static_cast<int64_t>(bytes)}, s.q.options().dtype(at::kByte));
  IndexerTopKParams p;
  p.scores = s.params;
  p.k = static_cast<int>(top_k);
  p.indices = out.indices_TK.data_ptr<int32_t>();
  p.indices_stride = top_k;
  if (want_scores) p.selected_scores = out.scores_TK.data_ptr<float>();
  p.selected_scores_stride = top_k;
  p.lengths = out.lengths_T.data_ptr<int32_t>();
  p.nan_counts = nan_counts.data_ptr<int32_t>();
  p.workspace = workspace.data_ptr();
  p.workspace_bytes = bytes;
  launch_indexer_topk_sm90(p);
  refuse_nan(nan_counts);
  return out;
}

}  // namespace dsa::native
