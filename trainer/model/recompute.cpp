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
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const RecomputedFunction& function,
                               const std::shared_ptr<HiddenStates>& hidden) {
    const auto holder = c10::make_intrusive<Holder>(function, hidden);
    ctx->saved_data["function"] = c10::IValue::make_capsule(holder);
    if (hidden) holder->number = hidden->put(x);
    else ctx->save_for_backward({x});
    const c10::NoGradGuard no_grad;
    auto [y, term] = function(x, /*first_of_two=*/true);
    return {y, term};
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const at::AutoGradMode grad(true);
    const auto capsule = ctx->saved_data["function"].toCapsule();
    const Holder& holder = static_cast<Holder&>(*capsule);
    const at::Tensor kept = holder.hidden ? holder.hidden->take(holder.number) : ctx->get_saved_variables()[0].detach();
    const at::Tensor x = kept.requires_grad_(true);
    auto [y, term] = holder.function(x, /*first_of_two=*/false);
    std::vector<at::Tensor> outputs{y}, output_gradients{gradients[0]};
    if (term.requires_grad()) {
      outputs.push_back(term);
      output_gradients.push_back(gradients[1]);
    }
    torch::autograd::backward(outputs, output_gradients);
    return {x.grad(), at::Tensor(), at::Tensor()};
  }

  struct Holder : torch::CustomClassHolder {
    Holder(RecomputedFunction f, std::shared_ptr<HiddenStates> h) : function(std::move(f)), hidden(std::move(h)) {}
    RecomputedFunction function;
    std::shared_ptr<HiddenStates> hidden;
    size_t number = 0;
  };
};

}  // namespace

std::pair<at::Tensor, at::Tensor> recompute(const at::Tensor& x, RecomputedFunction function,
                                            const std::shared_ptr<HiddenStates>& hidden) {
  if (!c10::GradMode::is_enabled() || !x.requires_grad()) return function(x, /*first_of_two=*/false);
  variable_list out = Recompute::apply(x, function, hidden);
  return {out[0], out[1]};
}

}  // namespace dsa
