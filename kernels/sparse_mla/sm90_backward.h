// The kernels of the backward pass and what passes between them: for every query row of a chunk (or group of rows with one
// list), every tile of 64 list entries and every block of 64 heads, P and dS as 64 x 64 bf16 tiles (keys x heads), swizzled as shared memory holds them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/sparse_mla/params.h"

namespace dsa::sparse_mla_sm90 {

constexpr int64_t kWeightBytes = 2 * 64 * 128;  // P, then dS

/// The lists of CTAs that take several queries, see sm90_backward_lists.cu. A CTA takes 64 rows of (query, head): one query's
/// 64 heads, or 2, 4 or 8 queries, each on 32, 16 or 8 rows.
struct Union {
  int group = 1;                ///< queries of a CTA; 1: no union, the caller's lists
  int32_t* keys = nullptr;      ///< [groups][group * K]
  uint16_t* places = nullptr;   ///< [groups][group * K][group], of the key in the query's list; kNowhere: not in it
  int32_t* lengths = nullptr;   ///< [groups]
};
constexpr int kNowhere = 0xFFFF;

/// Rows of a CTA that a query takes, as a power of two.
inline int row_shift(int heads) { return heads > 32 ? 6 : heads > 16 ? 5 : heads > 8 ? 4 : 3; }

struct Chunk {
  int64_t first_row, rows;
  char* weights;  // [groups][list entries / 64][head blocks][kWeightBytes]
  int multiprocessors;
  Union lists;
};

/// Writes the union of chunk.lists.group queries' lists.
void launch_unite(const SparseMlaBackwardParams& p, int64_t first_row, int64_t rows, const Union& out);
/// The maps' boxes span 32 rows of a CTA for the queries, 64 for the keys, 64 columns each.
void launch_queries(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g, const Chunk& chunk,
                    CUstream_st* stream);
void launch_keys(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g, const Chunk& chunk,
                 CUstream_st* stream);

}  // namespace dsa::sparse_mla_sm90
