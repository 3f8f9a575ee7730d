// See fp8_quant.h.
#include "kernels/fp8_quant/fp8_quant.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/ldexp.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/check.h"

namespace dsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr double kLargest = 448;      // of e4m3fn
constexpr double kSmallestAmax = 1e-4;

struct FakeQuantise : torch::autograd::Function<FakeQuantise> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& x, bool power_of_two, int64_t group) {
    const auto format = power_of_two ? ScaleFormat::POWER_OF_TWO : ScaleFormat::PLAIN;
    return act_dequant(act_quant(x, format, group)).to(x.scalar_type());
  }
  static variable_list backward(AutogradContext*, variable_list grads) { return {grads[0], at::Tensor(), at::Tensor()}; }
};

}  // namespace

at::Tensor fp8_scale(const at::Tensor& amax, ScaleFormat format) {
  const at::Tensor ratio = amax.to(at::kFloat).clamp_min(kSmallestAmax).div_(kLargest);
  if (format == ScaleFormat::PLAIN) return ratio;
  // ratio = mantissa 2^exponent with mantissa in [0.5, 1): ceil(log2) is the exponent, less 1 for an exact power.
  const auto [mantissa, exponent] = at::frexp(ratio);
  return at::ldexp(at::ones_like(ratio), exponent - (mantissa == 0.5).to(exponent.scalar_type()));
}

Fp8Tensor act_quant(const at::Tensor& x, ScaleFormat format, int64_t group) {
  require_float(x, "act_quant", "x");
  require(x.dim() >= 1 && group >= 1 && x.size(-1) % group == 0,
          "act_quant: the last dim of {} is no multiple of the group {} (each group has its own scale) choose a divisor",
          shape_of(x), group);
  const at::Tensor grouped = x.detach().to(at::kFloat).unflatten(-1, {x.size(-1) / group, group});
  const at::Tensor scale = fp8_scale(grouped.abs().amax(-1), format);
  const at::Tensor codes = (grouped / scale.unsqueeze(-1)).clamp_(-kLargest, kLargest).to(at::kFloat8_e4m3fn);
  return {codes.flatten(-2), scale};
}

at::Tensor act_dequant(const Fp8Tensor& q) {
  const int64_t groups = q.scale.size(-1);
  return q.codes.to(at::kFloat).unflatten(-1, {groups, q.codes.size(-1) / groups}).mul_(q.scale.unsqueeze(-1)).flatten(-2);
}

at::Tensor fake_quantise(const at::Tensor& x, ScaleFormat format, int64_t group) {
  return FakeQuantise::apply(x, format == ScaleFormat::POWER_OF_TWO, group);
}

}  // namespace dsa
