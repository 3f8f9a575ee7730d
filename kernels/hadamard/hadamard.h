// y = x H_n / sqrt(n), H_1 = [1], H_2n = [[H, H], [H, -H]] (Sylvester order). Symmetric and orthonormal:
// applied twice it is the identity, and it leaves q.k unchanged.
#pragma once

#include <ATen/core/Tensor.h>

namespace dsa {

/// x [..., n], n a power of two; fp32, fp64 or bf16 (fp32 inside, rounded once). Differentiable.
at::Tensor hadamard(const at::Tensor& x);

}  // namespace dsa
