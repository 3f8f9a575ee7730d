#include "trainer/model/blockwise.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

namespace dsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Plan : torch::CustomClassHolder {
  std::vector<int64_t> cut, unit;
  int64_t count, block, joined;
  BlockFunction f;

  int64_t blocks() const { return (count + block - 1) / block; }
  Block at(int64_t index, const at::Tensor& y) const {
    Block b{index, index * block, std::min(block, count - index * block), {}};
    if (y.defined()) b.known = part_of_y(y, b);
    return b;
  }
  at::Tensor part(const at::Tensor& x, size_t input, const Block& b) const {
    return cut[input] < 0 ? x : x.narrow(cut[input], b.begin * unit[input], b.count * unit[input]);
  }
  at::Tensor part_of_y(const at::Tensor& y, const Block& b) const {
    const int64_t unit_of_y = y.size(joined) / count;
    return y.narrow(joined, b.begin * unit_of_y, b.count * unit_of_y);
  }
};

struct Blockwise : torch::autograd::Function<Blockwise> {
  static at::Tensor forward(AutogradContext* ctx, at::TensorList inputs, const c10::intrusive_ptr<Plan>& plan) {
    at::Tensor y;
    for (int64_t i = 0; i < plan->blocks(); ++i) {
      const Block b = plan->at(i, {});
      variable_list parts;
      for (size_t n = 0; n < inputs.size(); ++n) parts.push_back(plan->part(inputs[n].detach(), n, b));
      const at::Tensor part = plan->f(b, parts);
      if (!y.defined()) {
        std::vector<int64_t> sizes = part.sizes().vec();
        sizes[plan->joined] = sizes[plan->joined] / b.count * plan->count;
        y = at::empty(sizes, part.options());
      }
      plan->part_of_y(y, b).copy_(part);
    }
    variable_list saved = inputs.vec();
    saved.push_back(y);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["plan"] = c10::IValue::make_capsule(plan);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto plan = c10::static_intrusive_pointer_cast<Plan>(ctx->saved_data["plan"].toCapsule());
    variable_list inputs = ctx->get_saved_variables();
    const at::Tensor y = inputs.back().detach();
    inputs.pop_back();
    const size_t count = inputs.size();
    variable_list sums(count), result(count + 1);
    for (int64_t i = 0; i < plan->blocks(); ++i) {
      const Block b = plan->at(i, y);
      variable_list parts, wanted;
      for (size_t n = 0; n < count; ++n) {
        at::Tensor part = plan->part(inputs[n].detach(), n, b);
        if (ctx->needs_input_grad(n)) wanted.push_back(part.requires_grad_(true));
        parts.push_back(part);
      }
      variable_list block_gradients;
      {
        const at::AutoGradMode grad(true);
        const at::Tensor part = plan->f(b, parts);
        block_gradients = torch::autograd::grad({part}, wanted, {plan->part_of_y(gradients[0], b)});
      }
      size_t next = 0;
      for (size_t n = 0; n < count; ++n) {
        if (!ctx->needs_input_grad(n)) continue;
        const at::Tensor& g = block_gradients[next++];
        const at::Tensor& x = inputs[n];
        if (plan->cut[n] >= 0) {
          if (!result[n].defined()) result[n] = at::empty(x.sizes(), x.options().requires_grad(false));
          plan->part(result[n], n, b).copy_(g);
        } else if (!sums[n].defined()) {
          sums[n] = g.to(g.scalar_type() == at::kDouble ? at::kDouble : at::kFloat, false, /*copy=*/true);
        } else {
          sums[n].add_(g);
        }
      }
    }
    for (size_t n = 0; n < count; ++n)
      if (sums[n].defined()) result[n] = sums[n].to(inputs[n].scalar_type());
    return result;
  }
};

struct KnownLinear : torch::autograd::Function<KnownLinear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_NI, const at::Tensor& w_OI, const at::Tensor& y_NO) {
    ctx->save_for_backward({x_NI, w_OI});
    return y_NO.detach();
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    variable_list result(3);
    if (ctx->needs_input_grad(0)) result[0] = at::mm(grads[0], saved[1]);
    if (ctx->needs_input_grad(1)) result[1] = at::mm(grads[0].t(), saved[0]);
    return result;
  }
};

}  // namespace

at::Tensor last_linear(const Block& block, const at::Tensor& x_NI, const at::Tensor& w_OI) {
  return block.known.defined() ? KnownLinear::apply(x_NI, w_OI, block.known) : at::linear(x_NI, w_OI);
}

at::Tensor blockwise(std::vector<BlockInput> inputs, int64_t count, int64_t block, int64_t joined, BlockFunction f) {
  variable_list values;
  for (const BlockInput& input : inputs) values.push_back(input.value);
  if (count <= block) return f({0, 0, count, {}}, values);
  auto plan = c10::make_intrusive<Plan>();
  for (const BlockInput& input : inputs) {
    plan->cut.push_back(input.cut);
    plan->unit.push_back(input.unit);
  }
  plan->count = count;
  plan->block = block;
  plan->joined = joined;
  plan->f = std::move(f);
  return Blockwise::apply(at::TensorList(values), plan);
}

}  // namespace dsa
