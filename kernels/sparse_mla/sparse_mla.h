// Sparse attention over the selected keys in latent (MQA) form: one key [c ; k_rope] shared by all heads, whose
// first C channels are also the value (DeepSeek-V3.2-Exp paper, eq. 2 and appendix A).
//
//   s[t,h,i] = scale * q[t,h] . kv[idx[t,i]]        i < lengths[t]
//   lse[t,h] = log sum_i exp(s)                     o[t,h] = sum_i p[t,h,i] kv[idx[t,i], :C],  p = exp(s - lse)
//   mass[t,i] = sum_h p[t,h,i]                      the indexer's target before division by the heads
//   backward: ds = p * (do.kv[:C] - o.do);  dq = scale ds kv;  dkv[idx] += scale ds^T q + [p^T do ; 0]
//
// Letters: T query rows, S keys, H heads, C latent dim, E = C + rope dim, K selected keys.
// q, kv: fp32, fp64 or bf16 (fp32 softmax and sums). Rows without keys: o = 0, lse = -inf, mass = 0.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace dsa {

/// Receives mass_TK [T,K] in the backward pass, where it costs nothing.
using MassReceiver = std::function<void(const at::Tensor& mass_TK)>;

struct SparseMlaOutput {
  at::Tensor o_THC;    ///< dtype of q
  at::Tensor lse_TH;   ///< natural log, fp32 (fp64 for fp64), without gradient
  at::Tensor mass_TK;  ///< fp32 (fp64 for fp64), without gradient; undefined unless want_mass
};

/// q_THE [T,H,E], kv_SE [S,E]; indices_TK int32 [T,K], valid for i < lengths_T[t] (int32 [T]); latent = C.
/// query_block bounds the rows of a score tile. Differentiable in q and kv; keeps only q, kv,
/// the indices, o and lse. bf16 at the released head sizes on a Hopper GPU: native.h (want_mass: the reference, the
/// forward kernel has no mass); else the reference. site: the same number for calls whose gradients are alike in size, a
/// layer and a block of its rows; it changes no result (quantum.h).
SparseMlaOutput sparse_mla(const at::Tensor& q_THE, const at::Tensor& kv_SE, const at::Tensor& indices_TK,
                           const at::Tensor& lengths_T, double scale, int64_t latent, int64_t query_block = 64,
                           bool want_mass = false, MassReceiver receive_mass = nullptr, int64_t site = 0);

}  // namespace dsa
