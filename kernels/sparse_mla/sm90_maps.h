// Tensor maps of q and do, and the checks that all launches of sparse_mla share.
#pragma once

#include <cuda.h>

#include "kernels/cuda/tensor_map.h"
#include "kernels/sparse_mla/params.h"

namespace dsa::sparse_mla_sm90 {

/// [T,H,columns] bf16 in boxes of one query, 64 heads, 64 columns; heads outside read as zero.
inline CUtensorMap map_heads(const void* base, const SparseMlaParams& p, int64_t stride, int columns) {
  return cuda::make_tensor_map(base, {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                                      {uint64_t(columns), uint64_t(p.heads), uint64_t(p.queries)},
                                      {uint64_t(columns) * 2, uint64_t(stride) * 2}, {64, 64, 1}});
}

/// Throws std::runtime_error unless the kernels take p.
void require_supported(const SparseMlaParams& p, const char* what);

}  // namespace dsa::sparse_mla_sm90
