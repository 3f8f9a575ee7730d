// See hadamard.h. Entry (i, j) of the Sylvester matrix is (-1)^popcount(i & j).
#include "kernels/hadamard/hadamard.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>

#include <bit>
#include <cmath>

#include "kernels/check.h"
#include "kernels/packed/packed.h"

namespace dsa {

at::Tensor hadamard(const at::Tensor& x) {
  const int64_t n = x.size(-1);
  require_float(x, "hadamard", "x");
  require(n > 0 && std::has_single_bit(static_cast<uint64_t>(n)),
          "hadamard: the last dim is {} (a power of two is expected) choose such an indexer head dim", n);
  at::Tensor h_nn = at::empty({n, n}, at::kFloat);
  float* sign = h_nn.data_ptr<float>();
  for (int64_t i = 0; i < n * n; ++i) sign[i] = std::popcount(static_cast<uint64_t>((i / n) & (i % n))) % 2 ? -1 : 1;
  const auto acc = accumulation_type(x);
  const double scale = 1 / std::sqrt(static_cast<double>(n));
  return at::matmul(x.to(acc), h_nn.to(x.device(), acc)).mul(scale).to(x.scalar_type());
}

}  // namespace dsa
