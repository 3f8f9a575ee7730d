#include "kernels/rms_norm/native.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "kernels/native.h"
#include "kernels/rms_norm/params.h"

namespace dsa::native {
namespace {

constexpr int kParts = 264;  // thread blocks of the backward pass, two a multiprocessor of an H100; fixed: the sums' order

RmsNormParams describe(const at::Tensor& x_ND, const at::Tensor& weight_D) {
  RmsNormParams p;
  p.rows = x_ND.size(0);
  p.dim = static_cast<int>(x_ND.size(1));
  p.x = x_ND.const_data_ptr();
  p.x_stride = x_ND.stride(0);
  p.w = weight_D.const_data_ptr<float>();
  p.stream = current_stream(x_ND);
  return p;
}

at::Tensor rows(const at::Tensor& x) {
  const at::Tensor x_ND = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  return x_ND.stride(1) == 1 ? x_ND : x_ND.contiguous();
}

}  // namespace

bool rms_norm_supports(const at::Tensor& x, const at::Tensor& weight_D, const char** why_not) {
  *why_not = nullptr;
  if (!x.is_cuda()) *why_not = "not on a GPU";
  else if (x.scalar_type() != at::kBFloat16 || weight_D.scalar_type() != at::kFloat) *why_not = "the kernel takes bf16 rows and fp32 weights";
  else if (x.numel() == 0) *why_not = "no rows";
  else dsa::rms_norm_supports(describe(rows(x), weight_D), why_not);
  return !*why_not;
}

std::pair<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight_D, double eps) {
  const at::Tensor x_ND = rows(x), w = weight_D.contiguous();
  RmsNormParams p = describe(x_ND, w);
  const at::Tensor y = at::empty(x.sizes(), x.options()), r = at::empty({p.rows}, w.options());
  p.eps = static_cast<float>(eps);
  p.y = y.data_ptr();
  p.r = r.data_ptr<float>();
  launch_rms_norm_forward(p);
  return {y, r};
}

std::pair<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight_D,
                                                    const at::Tensor& r, bool want_x, bool want_w) {
  const at::Tensor x_ND = rows(x), w = weight_D.contiguous(), gradient = dy.contiguous();
  RmsNormParams p = describe(x_ND, w);
  at::Tensor dx, parts;
  if (want_x) dx = at::empty(x.sizes(), x.options());
  p.parts = static_cast<int>(std::min<int64_t>(kParts, p.rows));
  if (want_w) parts = at::empty({p.parts, p.dim}, w.options());
  p.r = r.data_ptr<float>();
  p.dy = gradient.const_data_ptr();
  p.dx = want_x ? dx.data_ptr() : nullptr;
  p.dw_parts = want_w ? parts.data_ptr<float>() : nullptr;
  launch_rms_norm_backward(p);
  return {dx, want_w ? parts.sum(0) : at::Tensor()};
}

}  // namespace dsa::native
