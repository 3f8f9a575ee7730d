// Small tools on tensors for tests: seeded values, distances, directional derivatives.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <random>
#include <vector>

namespace dsa {

/// Normal deviates of a seed, fp64.
inline at::Tensor random_tensor(at::IntArrayRef sizes, uint64_t seed) {
  at::Tensor x = at::empty(sizes, at::kDouble);
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < x.numel(); ++i) x.data_ptr<double>()[i] = normal(engine);
  return x;
}

/// Largest |a - b| over the largest |b|; equal infinities count as equal, NaN or one-sided infinities give inf.
inline double relative_distance(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return std::numeric_limits<double>::infinity();
  const at::Tensor x = a.detach().to(at::kDouble), y = b.detach().to(at::kDouble), finite = y.isfinite();
  if (y.numel() == 0) return 0;
  if (!at::equal(x.isfinite(), finite) || !at::equal(x.masked_fill(finite, 0), y.masked_fill(finite, 0)))
    return std::numeric_limits<double>::infinity();
  const double scale = y.masked_fill(finite.logical_not(), 0).abs().max().item<double>();
  const double distance = (x - y).masked_fill(finite.logical_not(), 0).abs().max().item<double>();
  return scale > 0 ? distance / scale : distance;
}

/// Compares the gradients that autograd gives for sum(weights * f(inputs)) with central differences of f, fp64:
/// along `directions` random directions of every input.
inline void expect_gradients(const std::function<at::Tensor(const std::vector<at::Tensor>&)>& f,
                             std::vector<at::Tensor> inputs, double tolerance = 1e-7, int directions = 3) {
  for (auto& x : inputs) x = x.detach().clone().requires_grad_(true);
  const at::Tensor y = f(inputs), weights = random_tensor(y.sizes(), 991);
  (y * weights).sum().backward();
  const auto value = [&](size_t which, const at::Tensor& moved) {
    std::vector<at::Tensor> plain;
    for (auto& x : inputs) plain.push_back(x.detach());
    plain[which] = moved;
    return (f(plain) * weights).sum().item<double>();
  };
  for (size_t i = 0; i < inputs.size(); ++i) {
    ASSERT_TRUE(inputs[i].grad().defined()) << "input " << i << " has no gradient";
    ASSERT_EQ(inputs[i].grad().sizes(), inputs[i].sizes());
    for (int d = 0; d < directions; ++d) {
      const at::Tensor v = random_tensor(inputs[i].sizes(), 17 * i + d + 1), x = inputs[i].detach();
      const double h = 1e-5;
      const double expected = (value(i, x + v * h) - value(i, x - v * h)) / (2 * h);
      const double got = (inputs[i].grad() * v).sum().item<double>();
      const double size = (inputs[i].grad() * v).norm().item<double>() + 1e-3;
      EXPECT_NEAR(got, expected, tolerance * size * 10) << "input " << i << " direction " << d;
    }
  }
}

}  // namespace dsa
