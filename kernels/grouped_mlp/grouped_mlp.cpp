// See grouped_mlp.h. Forward keeps x and the two projections g = W_gate x, u = W_up x. Backward, a = silu(g) u:
//   da = dy W_down;  dW_down = dy^T a;  du = da silu(g);  dg = da u (sig + g sig (1 - sig)), sig = sigmoid(g)
//   dx = dg W_gate + du W_up;  dW_gate = dg^T x;  dW_up = du^T x
#include "kernels/grouped_mlp/grouped_mlp.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <numeric>

#include "kernels/check.h"
#include "kernels/grouped_mlp/native.h"
#include "kernels/native.h"
#include "kernels/packed/packed.h"

namespace dsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor activation(const at::Tensor& g, const at::Tensor& u) {
  const char* why_not = nullptr;
  if (native::swiglu_supports(g, &why_not)) {
    const at::Tensor a = at::empty_like(g);
    native::swiglu(g, u, a);
    return a;
  }
  const auto acc = accumulation_type(g);
  return at::silu(g.to(acc)).mul_(u.to(acc)).to(g.scalar_type());
}

struct Activation {
  at::Tensor a, dg, du;
};

Activation activation_backward(const at::Tensor& g, const at::Tensor& u, const at::Tensor& da) {
  const char* why_not = nullptr;
  if (native::swiglu_supports(g, &why_not)) {
    Activation s{at::empty_like(g), at::empty_like(g), at::empty_like(g)};
    native::swiglu_backward(g, u, da, s.a, s.dg, s.du);
    return s;
  }
  const auto acc = accumulation_type(g);
  const at::Tensor wide = g.to(acc), wide_da = da.to(acc);
  return {activation(g, u), at::silu_backward(wide_da * u.to(acc), wide).to(g.scalar_type()),
          (wide_da * at::silu(wide)).to(g.scalar_type())};
}

struct SwigluHidden : torch::autograd::Function<SwigluHidden> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_NH, const at::Tensor& gate_IH,
                            const at::Tensor& up_IH) {
    const at::Tensor g_NI = at::mm(x_NH, gate_IH.t()), u_NI = at::mm(x_NH, up_IH.t());
    ctx->save_for_backward({x_NH, gate_IH, up_IH, g_NI, u_NI});
    return activation(g_NI, u_NI);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x_NH = saved[0], &gate_IH = saved[1], &up_IH = saved[2];
    const Activation s = activation_backward(saved[3], saved[4], grads[0].contiguous());
    variable_list out(3);
    if (ctx->needs_input_grad(1)) out[1] = at::mm(s.dg.t(), x_NH);
    if (ctx->needs_input_grad(2)) out[2] = at::mm(s.du.t(), x_NH);
    if (ctx->needs_input_grad(0)) out[0] = at::mm(s.dg, gate_IH).addmm_(s.du, up_IH);
    return out;
  }
};

struct GroupedSwiglu : torch::autograd::Function<GroupedSwiglu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_MH, const std::vector<int64_t>& rows,
                            const at::Tensor& gate_EIH, const at::Tensor& up_EIH, const at::Tensor& down_EHI) {
    ctx->saved_data["rows"] = rows;
    const bool grouped = grouped_products(x_MH, gate_EIH);
    ran("grouped_mlp", grouped ? "LibTorch's grouped products" : "LibTorch's products, expert by expert");
    if (grouped) {
      const at::Tensor ends_E = row_ends(rows, x_MH.device()), x = x_MH.contiguous();
      const at::Tensor g_MI = at::_grouped_mm(x, gate_EIH.transpose(1, 2), ends_E);
      const at::Tensor u_MI = at::_grouped_mm(x, up_EIH.transpose(1, 2), ends_E);
      ctx->save_for_backward({x, gate_EIH, up_EIH, down_EHI, g_MI, u_MI});
      return at::_grouped_mm(activation(g_MI, u_MI), down_EHI.transpose(1, 2), ends_E);
    }
    const at::Tensor g_MI = at::empty({x_MH.size(0), gate_EIH.size(1)}, x_MH.options()), u_MI = at::empty_like(g_MI);
    at::Tensor y_MH = at::empty(x_MH.sizes(), x_MH.options());
    for (int64_t e = 0, first = 0; e < gate_EIH.size(0); first += rows[e++]) {
      if (rows[e] == 0) continue;
      const at::Tensor x = x_MH.narrow(0, first, rows[e]);
      at::Tensor g = g_MI.narrow(0, first, rows[e]), u = u_MI.narrow(0, first, rows[e]), y = y_MH.narrow(0, first, rows[e]);
      at::mm_out(g, x, gate_EIH[e].t());
      at::mm_out(u, x, up_EIH[e].t());
      at::mm_out(y, activation(g, u), down_EHI[e].t());
    }
    ctx->save_for_backward({x_MH, gate_EIH, up_EIH, down_EHI, g_MI, u_MI});
    return y_MH;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x_MH = saved[0], &gate_EIH = saved[1], &up_EIH = saved[2], &down_EHI = saved[3];
    const auto rows = ctx->saved_data["rows"].toIntVector();
    const bool need_x = ctx->needs_input_grad(0);
    const auto weight_gradient = [&](size_t tensor, const at::Tensor& weight) {  // counts tensor arguments alone
      return ctx->needs_input_grad(tensor) ? at::empty_like(weight) : at::Tensor();
    };
    if (grouped_products(x_MH, gate_EIH)) {
      const at::Tensor ends_E = row_ends(rows, x_MH.device()), dy = grads[0].contiguous();
      const Activation s = activation_backward(saved[4], saved[5], at::_grouped_mm(dy, down_EHI, ends_E));
      const auto weight = [&](size_t tensor, const at::Tensor& left, const at::Tensor& right) {
        return ctx->needs_input_grad(tensor) ? at::_grouped_mm(left.t(), right, ends_E) : at::Tensor();
      };
      at::Tensor dx;
      if (need_x) dx = at::_grouped_mm(s.dg, gate_EIH, ends_E).add_(at::_grouped_mm(s.du, up_EIH, ends_E));
      return {dx, at::Tensor(), weight(1, s.dg, x_MH), weight(2, s.du, x_MH), weight(3, dy, s.a)};
    }
    const at::Tensor dy_MH = grads[0].contiguous(), dx_MH = need_x ? at::empty(x_MH.sizes(), x_MH.options()) : at::Tensor();
    const at::Tensor dgate = weight_gradient(1, gate_EIH), dup = weight_gradient(2, up_EIH), ddown = weight_gradient(3, down_EHI);
    for (int64_t e = 0, first = 0; e < gate_EIH.size(0); first += rows[e++]) {
      const auto slice = [&](const at::Tensor& all) { return all.narrow(0, first, rows[e]); };
      const at::Tensor x = slice(x_MH), g = slice(saved[4]), u = slice(saved[5]), dy = slice(dy_MH);
      const Activation s = activation_backward(g, u, at::mm(dy, down_EHI[e]));
      write_product(ddown, e, dy, s.a);
      write_product(dgate, e, s.dg, x);
      write_product(dup, e, s.du, x);
      if (need_x && rows[e] > 0) {
        at::Tensor dx = slice(dx_MH);
        at::mm_out(dx, s.dg, gate_EIH[e]);
        dx.addmm_(s.du, up_EIH[e]);
      }
    }
    return {dx_MH, at::Tensor(), dgate, dup, ddown};
  }

  // One product over all experts: bf16 on a GPU, where loops over experts would starve it.
  static bool grouped_products(const at::Tensor& x_MH, const at::Tensor& gate_EIH) {
    return x_MH.is_cuda() && x_MH.scalar_type() == at::kBFloat16 && gate_EIH.size(0) > 1 && x_MH.size(0) > 0;
  }
  // int32 [E]: one past the last row of each expert.
  static at::Tensor row_ends(const std::vector<int64_t>& rows, at::Device device) {
    at::Tensor ends = at::empty({static_cast<int64_t>(rows.size())}, at::kInt);
    std::partial_sum(rows.begin(), rows.end(), ends.data_ptr<int32_t>());
    return ends.to(device);
  }
  // gradient[e] = left^T right, in place; a product over no rows is zero.
  static void write_product(const at::Tensor& gradient, int64_t e, const at::Tensor& left, const at::Tensor& right) {
    if (!gradient.defined()) return;
    at::Tensor slice = gradient[e];
    if (left.size(0) == 0) {
      slice.zero_();
    } else {
      at::mm_out(slice, left.t(), right);
    }
  }
};

}  // namespace

at::Tensor grouped_swiglu(const at::Tensor& x_MH, at::IntArrayRef rows_per_expert, const at::Tensor& gate_EIH,
                          const at::Tensor& up_EIH, const at::Tensor& down_EHI) {
  require(x_MH.dim() == 2 && gate_EIH.dim() == 3, "grouped_swiglu: x {} and gate {} ([M,H] and [E,I,H] are expected) reshape them",
          shape_of(x_MH), shape_of(gate_EIH));
  const int64_t E = gate_EIH.size(0), I = gate_EIH.size(1), H = x_MH.size(1);
  require_shape(gate_EIH, {E, I, H}, "grouped_swiglu", "gate");
  require_shape(up_EIH, {E, I, H}, "grouped_swiglu", "up");
  require_shape(down_EHI, {E, H, I}, "grouped_swiglu", "down");
  const int64_t rows = std::accumulate(rows_per_expert.begin(), rows_per_expert.end(), int64_t{0});
  require(static_cast<int64_t>(rows_per_expert.size()) == E && rows == x_MH.size(0),
          "grouped_swiglu: {} counts with sum {} for {} experts and {} rows (every row has one expert) count them again",
          rows_per_expert.size(), rows, E, x_MH.size(0));
  return GroupedSwiglu::apply(x_MH, rows_per_expert.vec(), gate_EIH, up_EIH, down_EHI);
}

at::Tensor swiglu_hidden(const at::Tensor& x_NH, const at::Tensor& w_gate_IH, const at::Tensor& w_up_IH) {
  require(x_NH.dim() == 2 && w_gate_IH.dim() == 2,
          "swiglu_hidden: x {} and gate {} ([N,H] and [I,H] are expected) reshape them", shape_of(x_NH),
          shape_of(w_gate_IH));
  require_shape(w_gate_IH, {w_gate_IH.size(0), x_NH.size(1)}, "swiglu_hidden", "gate");
  require_shape(w_up_IH, w_gate_IH.sizes(), "swiglu_hidden", "up");
  return SwigluHidden::apply(x_NH, w_gate_IH, w_up_IH);
}

at::Tensor swiglu_mlp(const at::Tensor& x, const at::Tensor& w_gate_IH, const at::Tensor& w_up_IH, const at::Tensor& w_down_HI) {
  const at::Tensor x_NH = x.reshape({-1, x.size(-1)});
  return grouped_swiglu(x_NH, {x_NH.size(0)}, w_gate_IH.unsqueeze(0), w_up_IH.unsqueeze(0), w_down_HI.unsqueeze(0))
      .view(x.sizes());
}

}  // namespace dsa
