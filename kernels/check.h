// require(condition, "problem (why) suggestion", arguments...): throws std::invalid_argument with the formatted text.
#pragma once

#include <ATen/core/Tensor.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <stdexcept>
#include <string>

namespace dsa {

template <typename... Args>
void require(bool ok, fmt::format_string<Args...> message, Args&&... args) {
  if (!ok) throw std::invalid_argument(fmt::format(message, std::forward<Args>(args)...));
}

/// "[4, 16, 64]"
inline std::string shape_of(const at::Tensor& x) {
  return x.defined() ? fmt::format("[{}]", fmt::join(x.sizes().begin(), x.sizes().end(), ", ")) : "undefined";
}

/// Throws unless x has exactly these sizes.
inline void require_shape(const at::Tensor& x, at::IntArrayRef sizes, const char* op, const char* name) {
  if (!x.defined() || x.sizes() != sizes) {
    throw std::invalid_argument(fmt::format("{}: {} has shape {} ([{}] is expected) pass tensors whose shapes agree", op,
                                            name, shape_of(x), fmt::join(sizes.begin(), sizes.end(), ", ")));
  }
}

/// Throws unless x is fp32, fp64 or bf16.
inline void require_float(const at::Tensor& x, const char* op, const char* name) {
  const auto type = x.scalar_type();
  require(type == at::kFloat || type == at::kDouble || type == at::kBFloat16,
          "{}: {} has dtype {} (fp32, fp64 and bf16 are supported) convert it first", op, name, toString(type));
}

}  // namespace dsa
