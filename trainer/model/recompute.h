// Activation recomputation: the first run keeps only its input; the backward pass runs the function again with
// gradients and goes through that graph. The input stays on the device, or waits in `hidden`. Both runs make the same
// collective calls, so ranks stay in step.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <utility>

#include "trainer/model/hidden_states.h"

namespace dsa {

// (x, first_of_two) -> (y, a scalar loss term). The function must outlive the backward pass.
using RecomputedFunction = std::function<std::pair<at::Tensor, at::Tensor>(const at::Tensor& x, bool first_of_two)>;

// hidden: null keeps x where it is.
std::pair<at::Tensor, at::Tensor> recompute(const at::Tensor& x, RecomputedFunction function,
                                            const std::shared_ptr<HiddenStates>& hidden = nullptr);

}  // namespace dsa
