// Plain statements of what the kernels of the dense indexer loss compute, for their tests.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/indexer_kl/params.h"

namespace dsa::test {

/// fp64 log-sum-exp of every row and head, [T][H]; -inf for rows without a key. p's device pointers but lse.
std::vector<double> reference_lse(const AttentionMassParams& p);

/// fp64 mass of rows rows[i], [n][S], 0 outside the range. lse [T][H] fp64 on the host.
std::vector<double> reference_mass(const AttentionMassParams& p, const std::vector<double>& lse, const std::vector<int64_t>& rows);

struct ReferenceKl {
  double kl = 0, entropy_target = 0, entropy_prediction = 0, recall = 0;
  std::vector<double> dI;  ///< [S], 0 outside the range
};

/// One row by the formulas of the header: mass and logits of S keys, of which [begin, end) count.
ReferenceKl reference_kl(const double* mass, const float* logits, int64_t keys, int64_t begin, int64_t end, int all_heads,
                         const std::vector<int32_t>& selected, double weight);

}  // namespace dsa::test
