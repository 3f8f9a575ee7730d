#include "kernels/grouped_mlp/native.h"

#include "kernels/grouped_mlp/params.h"
#include "kernels/native.h"

namespace dsa::native {

bool swiglu_supports(const at::Tensor& g, const char** why_not) {
  *why_not = nullptr;
  if (!g.is_cuda()) *why_not = "not on a GPU";
  else if (g.scalar_type() != at::kBFloat16) *why_not = "the kernel takes bf16";
  else if (g.size(-1) % 8) *why_not = "an intermediate size that is no multiple of 8";
  return !*why_not;
}

void swiglu(const at::Tensor& g, const at::Tensor& u, const at::Tensor& a) {
  SwigluParams p;
  p.elements = g.numel();
  p.g = g.const_data_ptr();
  p.u = u.const_data_ptr();
  p.a = a.data_ptr();
  p.stream = current_stream(g);
  launch_swiglu(p);
}

void swiglu_backward(const at::Tensor& g, const at::Tensor& u, const at::Tensor& da, const at::Tensor& a, const at::Tensor& dg,
                     const at::Tensor& du) {
  SwigluParams p;
  p.elements = g.numel();
  p.g = g.const_data_ptr();
  p.u = u.const_data_ptr();
  p.a = a.data_ptr();
  p.da = da.const_data_ptr();
  p.dg = dg.data_ptr();
  p.du = du.data_ptr();
  p.stream = current_stream(g);
  launch_swiglu(p);
}

}  // namespace dsa::native
