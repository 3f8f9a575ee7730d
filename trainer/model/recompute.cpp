#include "trainer/model/recompute.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace dsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Recompute : torch::autograd::Function<Recompute> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const RecomputedFunction& function) {
    ctx->save_for_backward({x});
    ctx->saved_data["function"] = c10::IValue::make_capsule(c10::make_intrusive<Holder>(function));
    const c10::NoGradGuard no_grad;
    auto [y, term] = function(x, /*first_of_two=*/true);
    return {y, term};
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const at::AutoGradMode grad(true);
    const at::Tensor x = ctx->get_saved_variables()[0].detach().requires_grad_(true);
    const auto holder = ctx->saved_data["function"].toCapsule();
    auto [y, term] = static_cast<Holder&>(*holder).function(x, /*first_of_two=*/false);
    std::vector<at::Tensor> outputs{y}, output_gradients{gradients[0]};
    if (term.requires_grad()) {
      outputs.push_back(term);
      output_gradients.push_back(gradients[1]);
    }
    torch::autograd::backward(outputs, output_gradients);
    return {x.grad(), at::Tensor()};
  }

  struct Holder : torch::CustomClassHolder {
    explicit Holder(RecomputedFunction f) : function(std::move(f)) {}
    RecomputedFunction function;
  };
};

}  // namespace

std::pair<at::Tensor, at::Tensor> recompute(const at::Tensor& x, RecomputedFunction function) {
  if (!c10::GradMode::is_enabled() || !x.requires_grad()) return function(x, /*first_of_two=*/false);
  variable_list out = Recompute::apply(x, function);
  return {out[0], out[1]};
}

}  // namespace dsa
