// See absorption.h. With g = dL/dy, by head:
//
//   absorbed_queries   dx = [g_latent W^T | inverse rope(g_rope)]    dW = x_nope^T g_latent
//   expanded_values    dx = g W                                      dW = g^T x
#include "kernels/absorption/absorption.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/check.h"

namespace dsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// y[t,h,:] = x[t,h,:] . w[h], with [T,H,:] tensors of any strides.
void multiply_into(const at::Tensor& y_THB, const at::Tensor& x_THA, const at::Tensor& w_HAB) {
  at::Tensor y_HTB = y_THB.transpose(0, 1);
  at::bmm_out(y_HTB, x_THA.transpose(0, 1), w_HAB);
}

// sum_t a[t,h,:]^T b[t,h,:].
at::Tensor outer_sums(const at::Tensor& a_THA, const at::Tensor& b_THB) {
  return at::bmm(a_THA.permute({1, 2, 0}), b_THB.transpose(0, 1));
}

at::Tensor empty_rows(const at::Tensor& like_TH, int64_t channels) {
  return at::empty({like_TH.size(0), like_TH.size(1), channels}, like_TH.options().requires_grad(false));
}

struct AbsorbedQueries : torch::autograd::Function<AbsorbedQueries> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_THD, const at::Tensor& w_HPC, const at::Tensor& cos_TR2,
                            const at::Tensor& sin_TR2) {
    ctx->save_for_backward({x_THD, w_HPC, cos_TR2, sin_TR2});
    const at::Tensor x = x_THD.detach(), w = w_HPC.detach();
    const int64_t P = w.size(1), C = w.size(2), R = x.size(2) - P;
    const at::Tensor y = empty_rows(x, C + R);
    multiply_into(y.narrow(2, 0, C), x.narrow(2, 0, P), w);
    rope_into(y.narrow(2, C, R), x.narrow(2, P, R), {cos_TR2, sin_TR2}, RopeLayout::INTERLEAVED, /*inverse=*/false);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor x = saved[0].detach(), w = saved[1].detach(), g = grads[0].contiguous();
    const int64_t P = w.size(1), C = w.size(2), R = x.size(2) - P;
    variable_list result(4);
    if (ctx->needs_input_grad(0)) {
      result[0] = empty_rows(x, P + R);
      multiply_into(result[0].narrow(2, 0, P), g.narrow(2, 0, C), w.transpose(1, 2));
      rope_into(result[0].narrow(2, P, R), g.narrow(2, C, R), {saved[2], saved[3]}, RopeLayout::INTERLEAVED, /*inverse=*/true);
    }
    if (ctx->needs_input_grad(1)) result[1] = outer_sums(x.narrow(2, 0, P), g.narrow(2, 0, C));
    return result;
  }
};

struct ExpandedValues : torch::autograd::Function<ExpandedValues> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_THC, const at::Tensor& w_HVC) {
    ctx->save_for_backward({x_THC, w_HVC});
    const at::Tensor y = empty_rows(x_THC, w_HVC.size(1));
    multiply_into(y, x_THC.detach(), w_HVC.detach().transpose(1, 2));
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor x = saved[0].detach(), w = saved[1].detach(), g = grads[0].contiguous();
    variable_list result(2);
    if (ctx->needs_input_grad(0)) {
      result[0] = empty_rows(x, x.size(2));
      multiply_into(result[0], g, w);
    }
    if (ctx->needs_input_grad(1)) result[1] = outer_sums(g, x);
    return result;
  }
};

}  // namespace

at::Tensor absorbed_queries(const at::Tensor& x_THD, const at::Tensor& w_HPC, const RopeTable& rope_T) {
  const int64_t R = 2 * rope_T.cos_TR2.size(1);
  require(x_THD.dim() == 3 && w_HPC.dim() == 3 && x_THD.size(1) == w_HPC.size(0) && x_THD.size(2) == w_HPC.size(1) + R &&
              rope_T.cos_TR2.size(0) == x_THD.size(0) && x_THD.scalar_type() == w_HPC.scalar_type(),
          "absorbed_queries: x {} {}, w {} {}, {} angles for each of {} rows ([T,H,P+R], [H,P,C] and R/2 for each of T are "
          "expected) reshape them",
          toString(x_THD.scalar_type()), shape_of(x_THD), toString(w_HPC.scalar_type()), shape_of(w_HPC),
          rope_T.cos_TR2.size(1), rope_T.cos_TR2.size(0));
  return AbsorbedQueries::apply(x_THD, w_HPC, rope_T.cos_TR2, rope_T.sin_TR2);
}

at::Tensor expanded_values(const at::Tensor& x_THC, const at::Tensor& w_HVC) {
  require(x_THC.dim() == 3 && w_HVC.dim() == 3 && x_THC.size(1) == w_HVC.size(0) && x_THC.size(2) == w_HVC.size(2) &&
              x_THC.scalar_type() == w_HVC.scalar_type(),
          "expanded_values: x {} {}, w {} {} ([T,H,C] and [H,V,C] of one dtype are expected) reshape them",
          toString(x_THC.scalar_type()), shape_of(x_THC), toString(w_HVC.scalar_type()), shape_of(w_HVC));
  return ExpandedValues::apply(x_THC, w_HVC);
}

}  // namespace dsa
