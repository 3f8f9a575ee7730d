#include "kernels/cross_entropy/native.h"

#include <ATen/ops/empty.h>

#include "kernels/cross_entropy/params.h"
#include "kernels/native.h"

namespace dsa::native {
namespace {

VocabTileParams describe(const at::Tensor& logits_BX, const at::Tensor& target_B, int64_t first) {
  VocabTileParams p;
  p.rows = logits_BX.size(0);
  p.words = logits_BX.size(1);
  p.logits = logits_BX.const_data_ptr<float>();
  p.target = target_B.const_data_ptr<int64_t>();
  p.first = first;
  p.stream = current_stream(logits_BX);
  return p;
}

}  // namespace

bool vocab_tile_supports(const at::Tensor& hidden_NH, const char** why_not) {
  *why_not = nullptr;
  if (!hidden_NH.is_cuda()) *why_not = "not on a GPU";
  else if (hidden_NH.scalar_type() != at::kBFloat16) *why_not = "the kernels take bf16";
  return !*why_not;
}

void vocab_tile_statistics(const at::Tensor& logits_BX, const at::Tensor& target_B, int64_t first, const at::Tensor& max_B,
                           const at::Tensor& sum_exp_B, const at::Tensor& target_logit_B) {
  VocabTileParams p = describe(logits_BX, target_B, first);
  p.max = max_B.data_ptr<float>();
  p.sum_exp = sum_exp_B.data_ptr<float>();
  p.target_logit = target_logit_B.data_ptr<float>();
  launch_vocab_tile_statistics(p);
}

at::Tensor vocab_tile_gradient(const at::Tensor& logits_BX, const at::Tensor& target_B, int64_t first, const at::Tensor& lse_B,
                               const at::Tensor& grad_B) {
  VocabTileParams p = describe(logits_BX, target_B, first);
  const at::Tensor d_BX = at::empty(logits_BX.sizes(), logits_BX.options().dtype(at::kBFloat16));
  p.lse = lse_B.const_data_ptr<float>();
  p.grad = grad_B.const_data_ptr<float>();
  p.d = d_BX.data_ptr();
  launch_vocab_tile_gradient(p);
  return d_BX;
}

}  // namespace dsa::native
