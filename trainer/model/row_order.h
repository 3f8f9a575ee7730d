// A permutation of rows:  y[i] = x[to[i]],  x[j] = y[back[j]].  Backward of either is the other.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

class RowOrder {
 public:
  // Leaves rows as they are.
  RowOrder() = default;
  // order: int64 [n], every number from 0 to n - 1 once: the row of x that becomes row i of y.
  explicit RowOrder(const at::Tensor& order);

  // x [n, ...] -> y, and y -> x. Differentiable.
  at::Tensor apply(const at::Tensor& x) const;
  at::Tensor undo(const at::Tensor& y) const;

  void move_to(at::Device device);

 private:
  at::Tensor to_, back_;  // int64 [n]
};

}  // namespace dsa
