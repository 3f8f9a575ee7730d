// Activation recomputation: the first run keeps only its input; the backward pass runs the function again with
// gradients and goes through that graph. Both runs make the same collective calls, so ranks stay in step.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <utility>

namespace dsa {

// (x, first_of_two) -> (y, a scalar loss term). The function must outlive the backward pass.
using RecomputedFunction = std::function<std::pair<at::Tensor, at::Tensor>(const at::Tensor& x, bool first_of_two)>;

std::pair<at::Tensor, at::Tensor> recompute(const at::Tensor& x, RecomputedFunction function);

}  // namespace dsa
