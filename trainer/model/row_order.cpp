#include "trainer/model/row_order.h"

#include <ATen/ops/argsort.h>
#include <ATen/ops/index_select.h>
#include <torch/csrc/autograd/custom_function.h>

namespace dsa {
namespace {

struct Permute : torch::autograd::Function<Permute> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& to, const at::Tensor& back) {
    ctx->save_for_backward({back});
    return x.index_select(0, to);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list gradient) {
    return {gradient[0].index_select(0, ctx->get_saved_variables()[0]), {}, {}};
  }
};

}  // namespace

RowOrder::RowOrder(const at::Tensor& order) : to_(order), back_(at::argsort(order)) {}

at::Tensor RowOrder::apply(const at::Tensor& x) const { return to_.defined() ? Permute::apply(x, to_, back_) : x; }
at::Tensor RowOrder::undo(const at::Tensor& y) const { return to_.defined() ? Permute::apply(y, back_, to_) : y; }

void RowOrder::move_to(at::Device device) {
  if (!to_.defined()) return;
  to_ = to_.to(device);
  back_ = back_.to(device);
}

}  // namespace dsa
