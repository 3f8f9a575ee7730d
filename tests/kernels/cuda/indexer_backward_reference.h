// The indexer's gradients, dense and over selected keys, as plain loops in fp64 on the device.
#pragma once

#include <cstdint>

#include "kernels/indexer_backward/params.h"
#include "kernels/indexer_kl/sparse_params.h"

namespace dsa::test {

/// Outputs in fp64: dq [T,J,128], dw [T,J], dk [S,128] (overwritten).
struct ReferenceGradients {
  double *dq, *dw, *dk;
};

/// From dI in p.d_logits.
void reference_indexer_backward(const IndexerBackwardParams& p, const ReferenceGradients& out);

/// I [T,K] of the listed keys, fp64 rounded once, stride p.scores_stride; NaN where an entry does not count.
void reference_indexer_scores(const IndexerKlSparseParams& p, float* scores);

/// From p.scores. Also kl, entropy of the target, entropy of the prediction, [T][3]; dI [T,K] is computed in fp64 and kept in d.
void reference_indexer_kl_sparse(const IndexerKlSparseParams& p, const ReferenceGradients& out, double* rows, double* d);

}  // namespace dsa::test
