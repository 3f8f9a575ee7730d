// Rotation of bf16 rows on a GPU; see params.h.
#pragma once

#include "kernels/rope/rope.h"

namespace dsa::native {

/// Whether the kernel takes these tensors; otherwise why_not says what is missing.
bool rope_supports(const at::Tensor& y, const at::Tensor& x, const RopeTable& table, const char** why_not);
/// y like x [T, (H,) R], rotated.
void rope(const at::Tensor& y, const at::Tensor& x, const RopeTable& table, RopeLayout layout, bool inverse);

}  // namespace dsa::native
