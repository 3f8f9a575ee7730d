// Scores and selects a block of rows at a time: as many rows as the workspace holds are scored, then selected.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/indexer_topk/params.h"
#include "kernels/topk_select/params.h"

namespace dsa {
namespace {

constexpr int64_t kLeastRows = 64, kMostRows = 4096;  // whole blocks of queries; several rows for each multiprocessor

int64_t row_stride(int64_t keys) { return (keys + 63) / 64 * 64; }  // whole 256-byte lines

TopKSelectParams selection(const IndexerTopKParams& p) {
  TopKSelectParams s;
  s.rows = p.scores.queries;
  s.columns = p.scores.keys;
  s.k = p.k;
  s.logits = static_cast<const float*>(p.workspace);
  s.logits_stride = row_stride(p.scores.keys);
  s.start = p.scores.start;
  s.end = p.scores.end;
  s.indices = p.indices;
  s.indices_stride = p.indices_stride;
  s.scores = p.selected_scores;
  s.scores_stride = p.selected_scores_stride;
  s.lengths = p.lengths;
  s.nan_counts = p.nan_counts;
  s.stream = p.scores.stream;
  return s;
}

}  // namespace

IndexerTopKWorkspace indexer_topk_workspace_sm90(int64_t queries, int64_t keys) {
  const size_t row = row_stride(keys) * sizeof(float);
  return {std::min(queries, kLeastRows) * row, std::min(queries, kMostRows) * row};
}

bool sm90_supports(const IndexerTopKParams& p, const char** why_not) {
  if (!sm90_supports(p.scores, why_not) || !sm90_supports(selection(p), why_not)) return false;
  if (p.workspace_bytes < indexer_topk_workspace_sm90(p.scores.queries, p.scores.keys).least)
    return *why_not = "the workspace is smaller than the least that indexer_topk_workspace_sm90 names", false;
  if (reinterpret_cast<uintptr_t>(p.workspace) % 256) return *why_not = "the workspace is not 256-byte aligned", false;
  return true;
}

void launch_indexer_topk_sm90(const IndexerTopKParams& p) {
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot run indexer_topk for Hopper (") + why + ") choose another implementation");
  const int64_t stride = row_stride(p.scores.keys), queries = p.scores.queries;
  const int64_t fit = stride == 0 ? queries : static_cast<int64_t>(p.workspace_bytes / (stride * sizeof(float)));
  const int64_t step = std::max<int64_t>(1, fit >= queries ? queries : fit / kLeastRows * kLeastRows);
  const int64_t element = p.scores.dtype == IndexerDtype::E4M3 ? 1 : 2;
  for (int64_t t = 0; t < queries; t += step) {
    IndexerLogitsParams score = p.scores;
    TopKSelectParams select = selection(p);
    score.queries = select.rows = std::min(step, queries - t);
    score.logits = static_cast<float*>(p.workspace);
    score.logits_stride = stride;
    score.fill_outside = false;
    score.q = static_cast<const char*>(score.q) + t * score.q_stride * element;
    score.w += t * score.w_stride;
    if (score.start) select.start = score.start += t;
    if (score.end) select.end = score.end += t;
    select.indices += t * select.indices_stride;
    if (select.scores) select.scores += t * select.scores_stride;
    select.lengths += t;
    if (select.nan_counts) select.nan_counts += t;
    launch_indexer_logits_sm90(score);
    launch_topk_select_sm90(select);
  }
}

}  // namespace dsa
