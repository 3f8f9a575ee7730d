// Checks and choice of implementation; see topk_select.h.
#include "kernels/topk_select/topk_select.h"

#include "kernels/check.h"
#include "kernels/indexer_topk/native.h"
#include "kernels/native.h"
#include "kernels/topk_select/reference.h"

namespace dsa {

TopK topk_select(const at::Tensor& logits_TS, int64_t k) {
  require(logits_TS.dim() == 2, "topk_select: logits have shape {} ([rows, keys] is expected) pass a matrix",
          shape_of(logits_TS));
  require(logits_TS.scalar_type() == at::kFloat || logits_TS.scalar_type() == at::kDouble,
          "topk_select: logits have dtype {} (the order is defined on fp32 and fp64) convert them first",
          toString(logits_TS.scalar_type()));
  require(k >= 1, "topk_select: k is {} (at least one key is selected) choose 1 or more", k);
  require(logits_TS.size(1) < (int64_t{1} << 31), "topk_select: {} keys (indices are int32) split the stream",
          logits_TS.size(1));
  const char* why_not = nullptr;
  if (native::topk_supports(logits_TS, k, &why_not)) {
    ran("topk_select", "sm90");
    return native::topk_select(logits_TS.detach(), k);
  }
  ran("topk_select", std::string("reference (") + why_not + ")");
  return reference::topk_select(logits_TS.detach(), k);
}

}  // namespace dsa
