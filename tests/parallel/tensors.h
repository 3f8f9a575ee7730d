// Inputs that every rank can compute for every other rank, so that expected values need no communication.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <vector>

namespace dsa::test {

/// A value in [-1, 1) with 20 random bits, from a counter.
inline double noise(uint64_t seed, uint64_t index) {
  uint64_t z = (seed + 1) * 0x9E3779B97F4A7C15ull + (index + 1) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return static_cast<double>(z >> 44) / (1 << 19) - 1.0;
}

/// Noise of `shape`; integers get values in [0, 200].
inline at::Tensor filled(std::vector<int64_t> shape, at::ScalarType dtype, uint64_t seed) {
  at::Tensor t = at::empty(shape, at::TensorOptions(at::kDouble));
  const bool integral = c10::isIntegralType(dtype, true);
  for (int64_t i = 0; i < t.numel(); ++i) {
    const double v = noise(seed, i);
    t.data_ptr<double>()[i] = integral ? static_cast<int64_t>((v + 1) * 100) : v;
  }
  return t.to(dtype);
}

inline std::vector<double> values(const at::Tensor& t) {
  const at::Tensor d = t.detach().to(at::kDouble).cpu().contiguous();
  return {d.data_ptr<double>(), d.data_ptr<double>() + d.numel()};
}

}  // namespace dsa::test
