// See indexer_topk.h.
#include "kernels/indexer_topk/indexer_topk.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "kernels/indexer_logits/indexer_logits.h"
#include "kernels/indexer_topk/native.h"
#include "kernels/native.h"
#include "kernels/packed/packed.h"

namespace dsa {

TopK indexer_topk(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ, const at::Tensor& start_T,
                  const at::Tensor& end_T, int64_t top_k, int64_t query_block, bool want_scores) {
  const int64_t T = q_TJD.size(0);
  const char* why_not = nullptr;
  if (native::indexer_supports(q_TJD, k_SD, &why_not) && top_k <= 4096) {
    ran("indexer_topk", "sm90");
    return native::indexer_topk(q_TJD.detach(), k_SD.detach(), w_TJ.detach(), start_T, end_T, top_k, want_scores);
  }
  ran("indexer_topk", std::string("by blocks of rows (") + (why_not ? why_not : "top_k over 4096") + ")");
  const auto options = q_TJD.options().dtype(at::kInt);
  TopK out{at::full({T, top_k}, -1, options), at::zeros({T}, options), {}};
  if (want_scores) out.scores_TK = at::zeros({T, top_k}, w_TJ.detach().options());
  // Only the keys that the block's rows can see are scored and searched; indices are shifted back.
  for (const RowBlock& block : row_blocks(KeyRanges(start_T, end_T, T, k_SD.size(0)), query_block)) {
    const int64_t B = block.row_end - block.row_begin, keys = block.key_end - block.key_begin;
    if (keys == 0) continue;
    const at::Tensor start = start_T.narrow(0, block.row_begin, B) - block.key_begin;
    const at::Tensor end = end_T.narrow(0, block.row_begin, B) - block.key_begin;
    // A row without keys may carry any numbers: as (0, 0) it stays inside the block's keys.
    const at::Tensor empty = start >= end;
    const at::Tensor scores =
        indexer_logits(q_TJD.narrow(0, block.row_begin, B), k_SD.narrow(0, block.key_begin, keys),
                       w_TJ.narrow(0, block.row_begin, B), start.masked_fill(empty, 0), end.masked_fill(empty, 0)).detach();
    const TopK part = topk_select(scores, top_k);
    if (want_scores)
      out.scores_TK.narrow(0, block.row_begin, B).copy_(scores.gather(1, part.indices_TK.clamp_min(0).to(at::kLong)));
    out.indices_TK.narrow(0, block.row_begin, B)
        .copy_(at::where(part.indices_TK < 0, part.indices_TK, part.indices_TK + block.key_begin));
    out.lengths_T.narrow(0, block.row_begin, B).copy_(part.lengths_T);
  }
  return out;
}

}  // namespace dsa
