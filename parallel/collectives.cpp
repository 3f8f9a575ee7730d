// One autograd node serves all: a linear map and its transpose.
#include "parallel/collectives.h"

#include <torch/csrc/autograd/custom_function.h>

#include <functional>

namespace dsa {

namespace {

using Map = std::function<at::Tensor(const at::Tensor&)>;

struct Transpose : torch::CustomClassHolder {
  explicit Transpose(Map m) : map(std::move(m)) {}
  Map map;
};

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const Map& map,
                            const Map& transpose) {
    ctx->saved_data["transpose"] = c10::IValue::make_capsule(c10::make_intrusive<Transpose>(transpose));
    return map(x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grad) {
    // An undefined gradient arrives as zeros, so the collective runs on every rank.
    auto transpose = c10::static_intrusive_pointer_cast<Transpose>(ctx->saved_data["transpose"].toCapsule());
    return {transpose->map(grad[0]), {}, {}};
  }
};

}  // namespace

at::Tensor gather_rows(const at::Tensor& x, Communicator& group) {
  if (group.size() == 1) return x;
  return Linear::apply(x, Map([&group](const at::Tensor& v) { return group.all_gather(v); }),
                       Map([&group](const at::Tensor& g) { return group.reduce_scatter(g); }));
}

at::Tensor reduce_scatter_rows(const at::Tensor& x, Communicator& group) {
  if (group.size() == 1) return x;
  return Linear::apply(x, Map([&group](const at::Tensor& v) { return group.reduce_scatter(v); }),
                       Map([&group](const at::Tensor& g) { return group.all_gather(g); }));
}

at::Tensor copy_to(const at::Tensor& x, Communicator& group) {
  if (group.size() == 1) return x;
  return Linear::apply(x, Map([](const at::Tensor& v) { return v; }),
                       Map([&group](const at::Tensor& g) { return group.all_reduce(g); }));
}

at::Tensor reduce_from(const at::Tensor& x, Communicator& group) {
  if (group.size() == 1) return x;
  return Linear::apply(x, Map([&group](const at::Tensor& v) { return group.all_reduce(v); }),
                       Map([](const at::Tensor& g) { return g; }));
}

at::Tensor all_to_all_rows(const at::Tensor& x, const std::vector<int64_t>& send_counts,
                           const std::vector<int64_t>& recv_counts, Communicator& group) {
  if (group.size() == 1) return x;
  return Linear::apply(
      x, Map([&group, send_counts, recv_counts](const at::Tensor& v) {
        return group.all_to_all(v, send_counts, recv_counts);
      }),
      Map([&group, send_counts, recv_counts](const at::Tensor& g) {
        return group.all_to_all(g, recv_counts, send_counts);
      }));
}

}  // namespace dsa
