// The up-projections of keys and values moved to the queries and the outputs, so that attention runs over the latent itself
// (DeepSeek-V2 section 2.1.2):
//
//   q_te . (W_UK c_s)  = (q_t W_UK) . c_s          absorbed_queries: y[t,h] = [x_nope[t,h] W[h] | rope(x_rope[t,h])]
//   sum_s p_s W_UV c_s = W_UV (sum_s p_s c_s)      expanded_values:  y[t,h] = W[h] x[t,h]
//
// Every product, forward and backward, is written where it is read next: nothing is concatenated or transposed in memory.
// Letters: T rows, H heads, P query channels without position, R with (rope), C latent, V value channels.
#pragma once

#include "kernels/rope/rope.h"

namespace dsa {

/// x_THD [T,H,P+R], w_HPC [H,P,C], the table of the T rows -> [T,H,C+R], contiguous, of x's dtype. Differentiable in x and w.
/// Throws std::invalid_argument for shapes or dtypes that disagree.
at::Tensor absorbed_queries(const at::Tensor& x_THD, const at::Tensor& w_HPC, const RopeTable& rope_T);

/// x_THC [T,H,C], w_HVC [H,V,C] -> [T,H,V], contiguous, of x's dtype. Differentiable in both. Throws likewise.
at::Tensor expanded_values(const at::Tensor& x_THC, const at::Tensor& w_HVC);

}  // namespace dsa
