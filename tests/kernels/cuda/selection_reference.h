// Plain statements of what the selection kernels compute, for their tests.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/indexer_logits/params.h"

namespace dsa::test {

struct ReferenceLogits {
  std::vector<double> value;      ///< [n][keys], NaN outside the range
  std::vector<double> magnitude;  ///< the same sum of absolute values: what rounding errors are measured by
};

/// fp64 logits of rows rows[i] of p (all its pointers on the device). On the GPU: one thread an entry, loops over heads
/// and dim.
ReferenceLogits reference_logits(const IndexerLogitsParams& p, const std::vector<int64_t>& rows);

/// The k best of scores[begin..end) by (score descending, index ascending); -inf and NaN never; ascending indices.
std::vector<int32_t> reference_top_k(const float* scores, int64_t begin, int64_t end, int64_t k);

}  // namespace dsa::test
