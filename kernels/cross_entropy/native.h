// The elementwise half of the loss over a tile of the vocabulary on a GPU; see params.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa::native {

/// Whether the kernels serve tensors of hidden's dtype and device; otherwise why_not says what is missing.
bool vocab_tile_supports(const at::Tensor& hidden_NH, const char** why_not);
/// Merges the tile into the rows' max_B, sum_exp_B and target_logit_B (fp32, contiguous).
void vocab_tile_statistics(const at::Tensor& logits_BX, const at::Tensor& target_B, int64_t first, const at::Tensor& max_B,
                           const at::Tensor& sum_exp_B, const at::Tensor& target_logit_B);
/// -> d(total)/d(logits), bf16 [B,X].
at::Tensor vocab_tile_gradient(const at::Tensor& logits_BX, const at::Tensor& target_B, int64_t first, const at::Tensor& lse_B,
                               const at::Tensor& grad_B);

}  // namespace dsa::native
