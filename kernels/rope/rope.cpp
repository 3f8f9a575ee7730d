// See rope.h.
#include "kernels/rope/rope.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/pow.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "kernels/check.h"
#include "kernels/native.h"
#include "kernels/rope/native.h"

namespace dsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Rope : torch::autograd::Function<Rope> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos_TR2,
                            const at::Tensor& sin_TR2, bool half_split) {
    ctx->save_for_backward({cos_TR2, sin_TR2});
    ctx->saved_data["half_split"] = half_split;
    return rotated(x, {cos_TR2, sin_TR2}, half_split, /*inverse=*/false);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    return {rotated(grads[0], {saved[0], saved[1]}, ctx->saved_data["half_split"].toBool(), /*inverse=*/true), at::Tensor(),
            at::Tensor(), at::Tensor()};
  }

 private:
  static at::Tensor rotated(const at::Tensor& x, const RopeTable& table, bool half_split, bool inverse) {
    const at::Tensor y = at::empty_like(x, x.options(), at::MemoryFormat::Contiguous);
    rope_into(y, x, table, half_split ? RopeLayout::HALF : RopeLayout::INTERLEAVED, inverse);
    return y;
  }
};

}  // namespace

at::Tensor rope_frequencies(const RopeParameters& p, at::ScalarType dtype) {
  require(p.dim >= 2 && p.dim % 2 == 0, "rope: dim is {} (channels rotate in pairs) choose an even number", p.dim);
  // Every step in the table's precision: the released models hold the roundings of the fp32 steps.
  const auto options = at::TensorOptions().dtype(dtype == at::kDouble ? at::kDouble : at::kFloat);
  const at::Tensor period = at::pow(p.theta, at::arange(0, p.dim, 2, options).div_(static_cast<double>(p.dim)));
  const at::Tensor frequency = period.reciprocal();
  if (!p.yarn) return frequency;
  const auto correction = [&](double rotations) {
    return p.dim * std::log(p.original_max_position / (rotations * 2 * M_PI)) / (2 * std::log(p.theta));
  };
  const double low = std::max(std::floor(correction(p.beta_fast)), 0.0);
  const double high = std::min(std::ceil(correction(p.beta_slow)), p.dim - 1.0);
  const double width = high > low ? high - low : 1e-3;
  const at::Tensor keep = 1 - at::arange(p.dim / 2, options).sub_(low).div_(width).clamp_(0, 1);
  return (period * p.factor).reciprocal() * (1 - keep) + frequency * keep;
}

RopeTable rope_table(const at::Tensor& positions_T, const RopeParameters& parameters, at::ScalarType dtype) {
  require(positions_T.dim() == 1 && positions_T.scalar_type() == at::kLong,
          "rope_table: positions are {} {} (int64 [rows] is expected) flatten them", toString(positions_T.scalar_type()),
          shape_of(positions_T));
  const at::Tensor frequency = rope_frequencies(parameters, dtype).to(positions_T.device());
  const at::Tensor angle = positions_T.to(frequency.scalar_type()).unsqueeze(1) * frequency;
  return {angle.cos(), angle.sin()};
}

void rope_into(const at::Tensor& y, const at::Tensor& x, const RopeTable& table, RopeLayout layout, bool inverse) {
  const char* why_not = nullptr;
  const bool on_gpu = native::rope_supports(y, x, table, &why_not);
  ran("rope", on_gpu ? "sm90" : std::string("reference (") + why_not + ")");
  if (on_gpu) return native::rope(y, x, table, layout, inverse);
  const int64_t half = table.cos_TR2.size(1);
  std::vector<int64_t> table_shape(x.dim(), 1);
  table_shape.front() = x.size(0);
  table_shape.back() = half;
  const at::Tensor c = table.cos_TR2.view(table_shape), s = (inverse ? table.sin_TR2.neg() : table.sin_TR2).view(table_shape);
  const at::Tensor wide = x.to(c.scalar_type());
  const auto part = [&](const at::Tensor& whole, int64_t which) {
    return layout == RopeLayout::HALF ? whole.narrow(-1, which * half, half)
                                      : whole.unflatten(-1, {half, 2}).select(-1, which);
  };
  const at::Tensor a = part(wide, 0), b = part(wide, 1);
  part(y, 0).copy_((a * c).sub_(b * s));
  part(y, 1).copy_((b * c).add_(a * s));
}

at::Tensor apply_rope(const at::Tensor& x, const RopeTable& table, RopeLayout layout) {
  require(x.dim() >= 2 && table.cos_TR2.size(0) == x.size(0) && 2 * table.cos_TR2.size(1) == x.size(-1),
          "apply_rope: x {} beside a table {} (rows and half the channels must agree) build the table for these rows",
          shape_of(x), shape_of(table.cos_TR2));
  return Rope::apply(x, table.cos_TR2, table.sin_TR2, layout == RopeLayout::HALF);
}

}  // namespace dsa
