// SwiGLU's elementwise half on a GPU; see params.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa::native {

/// Whether the kernel takes this tensor; otherwise why_not says what is missing.
bool swiglu_supports(const at::Tensor& g, const char** why_not);
/// a = silu(g) u, all of one shape, contiguous bf16.
void swiglu(const at::Tensor& g, const at::Tensor& u, const at::Tensor& a);
/// Also dg and du from da. dg may be g and du may be u.
void swiglu_backward(const at::Tensor& g, const at::Tensor& u, const at::Tensor& da, const at::Tensor& a, const at::Tensor& dg,
                     const at::Tensor& du);

}  // namespace dsa::native
