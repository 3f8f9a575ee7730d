// A block of rows at a time: as many as the workspace holds; see dense_params.h.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/indexer_kl/dense_params.h"
#include "kernels/topk_select/params.h"

namespace dsa {
namespace {

constexpr int64_t kStep = 256;  // rows; a cluster's tile of the target

int64_t stride_of(int64_t keys) { return (keys + 63) / 64 * 64; }  // whole lines

struct Plan {
  IndexerLogitsParams logits;
  TopKSelectParams select;
  AttentionMassParams attention;
  const float* mass;
  DenseKlRows rows;
  IndexerBackwardParams gradient;
  size_t bytes;

  /// Rows [first, first + count), with the workspace at `base`.
  Plan(const IndexerKlDenseParams& p, int64_t first, int64_t count, char* base)
      : logits(p.scores),
        attention(p.attention),
        mass(p.mass ? p.mass + first * p.mass_stride : nullptr),
        rows(p.rows),
        gradient(p.gradient) {
    const AttentionMassParams& a = p.attention;
    const int64_t stride = stride_of(a.keys);
    size_t at = 0;
    const auto take = [&](size_t size) {
      char* const here = base + at;
      at += (size + 255) / 256 * 256;
      return here;
    };
    logits.queries = select.rows = attention.queries = gradient.queries = count;
    logits.keys = select.columns = gradient.keys = a.keys;
    logits.start = select.start = attention.start = gradient.start = a.start ? a.start + first : nullptr;
    logits.end = select.end = attention.end = gradient.end = a.end ? a.end + first : nullptr;
    logits.stream = select.stream = gradient.stream = a.stream;

    logits.q = static_cast<const char*>(logits.q) + first * logits.q_stride * (logits.dtype == IndexerDtype::E4M3 ? 1 : 2);
    logits.w += first * logits.w_stride;
    logits.logits = reinterpret_cast<float*>(take(count * stride * sizeof(float)));
    logits.logits_stride = stride;
    logits.fill_outside = false;

    if (p.top_k > 0) {
      select.k = p.top_k;
      select.logits = logits.logits, select.logits_stride = stride;
      select.indices = reinterpret_cast<int32_t*>(take(count * p.top_k * sizeof(int32_t)));
      select.indices_stride = p.top_k;
      select.lengths = reinterpret_cast<int32_t*>(take(count * sizeof(int32_t)));
    }

    if (!mass) {
      attention.q = static_cast<const uint16_t*>(a.q) + first * a.q_stride;
      attention.lse += first * a.lse_stride;
    }
    attention.workspace_bytes = dense_kl_workspace_bytes(count, a.keys);
    attention.workspace = take(attention.workspace_bytes);

    rows.logits = logits.logits, rows.logits_stride = stride;
    rows.selected = select.indices, rows.selected_stride = select.indices_stride, rows.selected_lengths = select.lengths;
    for (float** out : {&rows.kl, &rows.entropy_target, &rows.entropy_prediction, &rows.recall})
      if (*out) *out += first;
    if (rows.row_weight) rows.row_weight += first;
    rows.dI = nullptr;

    if (gradient.dq) {
      rows.dI = logits.logits, rows.dI_stride = stride;
      gradient.d_logits = rows.dI, gradient.d_logits_stride = stride;
      gradient.q = static_cast<const uint16_t*>(gradient.q) + first * gradient.q_stride;
      gradient.w += first * gradient.w_stride;
      gradient.dq = static_cast<char*>(gradient.dq) + first * gradient.heads * gradient.dim * (gradient.dq_bf16 ? 2 : 4);
      gradient.dw += first * gradient.heads;
      gradient.workspace_bytes = indexer_backward_workspace_bytes(gradient);
      gradient.workspace = take(gradient.workspace_bytes);
    }
    bytes = at;
  }
};

}  // namespace

size_t indexer_kl_dense_workspace_bytes(const IndexerKlDenseParams& p, int64_t rows) {
  return Plan(p, 0, std::min(rows, p.attention.queries), nullptr).bytes;
}

bool sm90_supports(const IndexerKlDenseParams& p, const char** why_not) {
  const Plan plan(p, 0, p.attention.queries, nullptr);
  if (!p.mass && !sm90_supports(plan.attention, why_not)) return false;
  if (p.mass && (reinterpret_cast<uintptr_t>(p.mass) % 8 || p.mass_stride % 2))
    return *why_not = "the mass is not 8-byte aligned or its stride is odd", false;
  if (!sm90_supports(plan.logits, why_not)) return false;
  if (p.top_k != 0 && !sm90_supports(plan.select, why_not)) return false;
  if (p.gradient.dq && !sm90_supports(plan.gradient, why_not)) return false;
  if (p.workspace_bytes < indexer_kl_dense_workspace_bytes(p, kStep))
    return *why_not = "the workspace is smaller than indexer_kl_dense_workspace_bytes names for 256 rows", false;
  if (reinterpret_cast<uintptr_t>(p.workspace) % 256) return *why_not = "the workspace is not 256-byte aligned", false;
  return true;
}

void launch_indexer_kl_dense_sm90(const IndexerKlDenseParams& p) {
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot run the dense indexer loss for Hopper (") + why + ") choose another implementation");
  const int64_t queries = p.attention.queries;
  if (queries == 0) return;
  int64_t step = (queries + kStep - 1) / kStep * kStep;
  while (indexer_kl_dense_workspace_bytes(p, step) > p.workspace_bytes) step -= kStep;
  const int64_t blocks = (queries + step - 1) / step;
  step = ((queries + blocks - 1) / blocks + kStep - 1) / kStep * kStep;  // alike in size
  for (int64_t t = 0; t < queries; t += step) {
    const Plan plan(p, t, std::min(step, queries - t), static_cast<char*>(p.workspace));
    launch_indexer_logits_sm90(plan.logits);
    if (p.top_k > 0) launch_topk_select_sm90(plan.select);
    if (plan.mass) launch_dense_kl_of_mass_sm90(plan.attention, plan.mass, p.mass_stride, plan.rows);
    else launch_dense_kl_sm90(plan.attention, plan.rows);
    if (plan.gradient.dq) launch_indexer_backward_sm90(plan.gradient);
  }
}

}  // namespace dsa
