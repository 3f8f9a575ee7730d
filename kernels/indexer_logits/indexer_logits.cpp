// Checks and choice of implementation; see indexer_logits.h.
#include "kernels/indexer_logits/indexer_logits.h"

#include "kernels/check.h"
#include "kernels/indexer_logits/reference.h"
#include "kernels/indexer_topk/native.h"
#include "kernels/native.h"

namespace dsa {
namespace {

void check_inputs(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ) {
  require(q_TJD.dim() == 3 && k_SD.dim() == 2, "indexer_logits: q {} and k {} (q [T,J,D] and k [S,D] are expected) reshape them",
          shape_of(q_TJD), shape_of(k_SD));
  require_shape(k_SD, {k_SD.size(0), q_TJD.size(2)}, "indexer_logits", "k");
  require_shape(w_TJ, {q_TJD.size(0), q_TJD.size(1)}, "indexer_logits", "w");
  require_float(q_TJD, "indexer_logits", "q");
  require_float(k_SD, "indexer_logits", "k");
  require_float(w_TJ, "indexer_logits", "w");
}

void check_indices(const at::Tensor& indices_TK, int64_t rows) {
  require(indices_TK.dim() == 2 && indices_TK.size(0) == rows,
          "indexer_logits: indices {} beside {} query rows (one list a row is expected) select again", shape_of(indices_TK), rows);
}

}  // namespace

at::Tensor indexer_logits(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ,
                          const at::Tensor& start_T, const at::Tensor& end_T) {
  check_inputs(q_TJD, k_SD, w_TJ);
  const char* why_not = nullptr;
  if (native::indexer_supports(q_TJD, k_SD, &why_not)) {
    ran("indexer_logits", "sm90");
    return native::indexer_logits(q_TJD.detach(), k_SD.detach(), w_TJ.detach(), start_T, end_T);
  }
  ran("indexer_logits", std::string("reference (") + why_not + ")");
  return reference::indexer_logits(q_TJD.detach(), k_SD.detach(), w_TJ.detach(), start_T, end_T);
}

IndexerGradients indexer_logits_backward(const at::Tensor& dI_TS, const at::Tensor& q_TJD, const at::Tensor& k_SD,
                                         const at::Tensor& w_TJ, const at::Tensor& start_T, const at::Tensor& end_T) {
  check_inputs(q_TJD, k_SD, w_TJ);
  require_shape(dI_TS, {q_TJD.size(0), k_SD.size(0)}, "indexer_logits_backward", "dI");
  return reference::indexer_logits_backward(dI_TS.detach(), q_TJD.detach(), k_SD.detach(), w_TJ.detach(), start_T, end_T);
}

at::Tensor indexer_logits_selected(const at::Tensor& q_TJD, const at::Tensor& k_SD, const at::Tensor& w_TJ,
                                   const at::Tensor& indices_TK) {
  check_inputs(q_TJD, k_SD, w_TJ);
  check_indices(indices_TK, q_TJD.size(0));
  return reference::indexer_logits_selected(q_TJD.detach(), k_SD.detach(), w_TJ.detach(), indices_TK);
}

IndexerGradients indexer_logits_selected_backward(const at::Tensor& dI_TK, const at::Tensor& q_TJD,
                                                  const at::Tensor& k_SD, const at::Tensor& w_TJ,
                                                  const at::Tensor& indices_TK) {
  check_inputs(q_TJD, k_SD, w_TJ);
  check_indices(indices_TK, q_TJD.size(0));
  require_shape(dI_TK, indices_TK.sizes(), "indexer_logits_selected_backward", "dI");
  return reference::indexer_logits_selected_backward(dI_TK.detach(), q_TJD.detach(), k_SD.detach(), w_TJ.detach(), indices_TK);
}

}  // namespace dsa
