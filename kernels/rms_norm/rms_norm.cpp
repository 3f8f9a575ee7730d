// See rms_norm.h.  Backward of RMSNorm, with n = x r, r = rsqrt(mean(x^2) + eps), g = dy w:
//   dx = r (g - n mean(g n)),  dw = sum over rows of dy n
// and of LayerNorm, n = (x - mean) r:  dx = r (g - mean(g) - n mean(g n)),  db = sum of dy.
#include "kernels/rms_norm/rms_norm.h"

#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/check.h"
#include "kernels/native.h"
#include "kernels/packed/packed.h"
#include "kernels/rms_norm/native.h"

namespace dsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const at::Tensor& x, const at::Tensor& weight_D, const char* op) {
  require(x.dim() >= 1, "{}: x is a scalar (the last dim is normalised) pass rows", op);
  require_float(x, op, "x");
  require_shape(weight_D, {x.size(-1)}, op, "weight");
}

at::Tensor sum_rows(const at::Tensor& x, const at::Tensor& like) {
  return x.reshape({-1, x.size(-1)}).sum(0).to(like.scalar_type());
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight_D, double eps) {
    const char* why_not = nullptr;
    const bool on_gpu = native::rms_norm_supports(x, weight_D, &why_not);
    ran("rms_norm", on_gpu ? "sm90" : std::string("reference (") + why_not + ")");
    if (on_gpu) {
      const auto [y, r] = native::rms_norm(x.detach(), weight_D.detach(), eps);
      ctx->save_for_backward({x, weight_D, r});
      ctx->saved_data["native"] = true;
      return y;
    }
    const auto acc = accumulation_type(x);
    const at::Tensor wide = x.to(acc), r = wide.square().mean(-1, true).add_(eps).rsqrt_();
    ctx->save_for_backward({x, weight_D, r});
    ctx->saved_data["native"] = false;
    return (wide * r).mul_(weight_D.to(acc)).to(x.scalar_type());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight_D = saved[1], &r = saved[2];
    if (ctx->saved_data["native"].toBool()) {
      const auto [dx, dw] = native::rms_norm_backward(grads[0], x.detach(), weight_D.detach(), r, ctx->needs_input_grad(0),
                                                      ctx->needs_input_grad(1));
      return {dx, dw, at::Tensor()};
    }
    const at::Tensor dy = grads[0].to(r.scalar_type()), n = x.to(r.scalar_type()) * r;
    const at::Tensor dyn = dy * n, w = weight_D.to(r.scalar_type());
    variable_list result(3);
    if (ctx->needs_input_grad(1)) result[1] = sum_rows(dyn, weight_D);
    if (ctx->needs_input_grad(0)) {
      const at::Tensor mean = dyn.matmul(w).unsqueeze(-1).div_(static_cast<double>(x.size(-1)));
      result[0] = (dy * w).sub_(n * mean).mul_(r).to(x.scalar_type());
    }
    return result;
  }
};

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight_D,
                            const at::Tensor& bias_D, double eps) {
    const auto acc = accumulation_type(x);
    const at::Tensor wide = x.to(acc), mean = wide.mean(-1, true), centred = wide - mean;
    const at::Tensor r = centred.square().mean(-1, true).add_(eps).rsqrt_();
    ctx->save_for_backward({x, weight_D, bias_D, mean, r});
    return (centred * r).mul_(weight_D.to(acc)).add_(bias_D.to(acc)).to(x.scalar_type());
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight_D = saved[1], &bias_D = saved[2], &mean = saved[3], &r = saved[4];
    const at::Tensor dy = grads[0].to(r.scalar_type()), n = (x.to(r.scalar_type()) - mean).mul_(r);
    variable_list result(4);
    if (ctx->needs_input_grad(1)) result[1] = sum_rows(dy * n, weight_D);
    if (ctx->needs_input_grad(2)) result[2] = sum_rows(dy, bias_D);
    if (ctx->needs_input_grad(0)) {
      const at::Tensor g = dy * weight_D.to(r.scalar_type());
      const at::Tensor mean_gn = (g * n).mean(-1, true);
      result[0] = (g - g.mean(-1, true)).sub_(n * mean_gn).mul_(r).to(x.scalar_type());
    }
    return result;
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight_D, double eps) {
  check(x, weight_D, "rms_norm");
  return RmsNorm::apply(x, weight_D, eps);
}

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight_D, const at::Tensor& bias_D, double eps) {
  check(x, weight_D, "layer_norm");
  require_shape(bias_D, {x.size(-1)}, "layer_norm", "bias");
  return LayerNorm::apply(x, weight_D, bias_D, eps);
}

}  // namespace dsa
