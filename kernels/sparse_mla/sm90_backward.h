// The two kernels of the backward pass and what passes between them: for every query row of a chunk, every tile of 64 list
// entries and every block of 64 heads, P and dS as 64 x 64 bf16 tiles (heads x keys), swizzled as shared memory holds them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/sparse_mla/params.h"

namespace dsa::sparse_mla_sm90 {

constexpr int64_t kWeightBytes = 2 * 64 * 128;  // P, then dS

struct Chunk {
  int64_t first_row, rows;
  char* weights;  // [rows][K / 64][head blocks][kWeightBytes]
  int multiprocessors;
};

void launch_queries(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g, const Chunk& chunk,
                    CUstream_st* stream);
void launch_keys(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g, const Chunk& chunk,
                 CUstream_st* stream);

}  // namespace dsa::sparse_mla_sm90
