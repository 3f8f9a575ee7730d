// Sparse attention in latent form as plain loops in fp64 on the device, and random ascending lists.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/sparse_mla/params.h"

namespace dsa::test {

/// Outputs in fp64: o [T,H,512], lse [T,H]; with d_o also dq [T,H,576], dkv [S,576] (added to), p_sel [T,K] (added to).
/// delta is computed here from the fp64 o.
struct SparseMlaReference {
  double *o, *lse;
  const void* d_o = nullptr;  ///< bf16 [T,H,512] contiguous
  double *dq = nullptr, *dkv = nullptr, *p_sel = nullptr;
};
void reference_sparse_mla(const SparseMlaParams& p, const SparseMlaReference& r);

/// || got - want || / || want ||, got fp32 or bf16 on the device.
double relative_error(const float* got, const double* want, int64_t n);
double relative_error_bf16(const void* got, const double* want, int64_t n);
/// 1 - cosine of the angle.
double cosine_distance_bf16(const void* got, const double* want, int64_t n);

enum class Lists { RANDOM, LOCAL, SHARED };
/// Row t sees keys 0 to last_key(t) = keys - rows + t; k ascending entries, or all of them and -1.
/// RANDOM: uniform; LOCAL: half of them among the last 8192; SHARED: the best of one score a key plus 0.3 noise a row.
void make_lists(Lists kind, int64_t rows, int64_t keys, int k, uint32_t seed, std::vector<int32_t>& indices,
                std::vector<int32_t>& lengths);

}  // namespace dsa::test
