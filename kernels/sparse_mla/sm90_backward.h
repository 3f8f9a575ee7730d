// The kernels of the backward pass and what passes between them: for every query row of a chunk (or group of rows with
// one list), every tile of 64 list entries and every block of 64 heads, P and dS as 64 x 64 bf16 tiles (keys x heads),
// swizzled as shared memory holds them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/sparse_mla/params.h"
#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {

constexpr int64_t kWeightBytes = 2 * 64 * 128;  // P, then dS

/// Several lists as one, see sm90_backward_lists.cu.
struct Union {
  int group = 1;                ///< lists; 1: no union
  int k = 0;                    ///< entries of a list, at most
  int32_t* keys = nullptr;      ///< [groups][group * k], -1 after the last to a multiple of kTile
  uint16_t* places = nullptr;   ///< [groups][group * k][group], of the key in the list; kNowhere: not in it
  int32_t* lengths = nullptr;   ///< [groups]
};
constexpr int kNowhere = 0xFFFF;

/// Rows of a CTA that a query takes, as a power of two.
inline int row_shift(int heads) { return heads > 32 ? 6 : heads > 16 ? 5 : heads > 8 ? 4 : 3; }

/// Which lists of a chunk name a key, see sm90_backward_sums.cu.
struct Mentions {
  int stride = 0;               ///< lists, at most kMostLists
  uint32_t* bits = nullptr;     ///< [keys / 32][stride], one bit a key that counts; launch_sums leaves zeros behind
  uint16_t* places = nullptr;   ///< [keys / 32][stride], of the first of these keys in the list
  uint8_t* searched = nullptr;  ///< [stride], lists in which the places do not follow one another
  uint32_t* marks = nullptr;    ///< [keys / 32], one bit a key that counts for any of the last 1024 queries
  int32_t* named = nullptr;     ///< [1], how many these are
};
constexpr int kMostLists = 1024;  // of a chunk
/// Of more named keys half of the sums stay in the L2 cache rather than all of them: the kernel of the keys sums half of
/// the columns for all queries of a chunk, then the other half.
constexpr int kHalvesFrom = 24576;

struct Chunk {
  int64_t first_row = 0, rows = 0;
  char* weights = nullptr;  // [groups][list entries / 64][head blocks][kWeightBytes]
  int multiprocessors = 0;
  /// Of CTAs that take several queries: a CTA takes 64 rows of (query, head), one query's 64 heads, or 2, 4 or 8
  /// queries, each on 32, 16 or 8 rows.
  Union lists;
  /// Of each two of these (or of the caller's) lists: launch_keys takes them at once, or one by one where the length is
  /// 0. For at most 64 heads.
  Union pairs;
  void* contributions = nullptr;  ///< bf16 [groups][list entries][576]; null: there are at most cached_keys keys
  Mentions mentions;
};

inline Lists own_lists(const SparseMlaParams& p) {
  return {p.indices, p.indices_stride, p.lengths, p.k, static_cast<int>(p.keys)};
}
inline Lists lists_of(const SparseMlaParams& p, const Union& of) {
  return {of.keys, int64_t{of.group} * of.k, of.lengths, of.group * of.k, static_cast<int>(p.keys)};
}
/// The lists that a chunk's groups of queries walk, beginning with first_list.
inline Lists lists_of(const SparseMlaParams& p, const Chunk& chunk) {
  return chunk.lists.group > 1 ? lists_of(p, chunk.lists) : own_lists(p);
}
inline int64_t first_list(const Chunk& chunk) { return chunk.lists.group > 1 ? 0 : chunk.first_row; }
inline int64_t groups_of(const Chunk& chunk) { return (chunk.rows + chunk.lists.group - 1) / chunk.lists.group; }

/// Writes marks and named and clears bits if there are any, on the caller's stream.
void launch_count_named(const SparseMlaBackwardParams& p, const Mentions& out);
/// Writes bits, places and searched if more than cached_keys keys are named.
void launch_mentions(const SparseMlaBackwardParams& p, const Chunk& chunk, CUstream_st* stream);
/// Adds chunk.contributions to dkv_sum then; otherwise launch_keys has done it.
void launch_sums(const SparseMlaBackwardParams& p, const Chunk& chunk, CUstream_st* stream);
/// Writes chunk.lists.
void launch_unite(const SparseMlaBackwardParams& p, const Chunk& chunk, CUstream_st* stream);
/// Writes chunk.pairs, unless more than cached_keys keys are named.
void launch_pair(const SparseMlaBackwardParams& p, const Chunk& chunk, CUstream_st* stream);
/// The maps' boxes span 32 rows of a CTA for the queries, 64 for the keys, 64 columns each.
void launch_queries(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g,
                    const Chunk& chunk, CUstream_st* stream);
void launch_keys(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g,
                 const Chunk& chunk, CUstream_st* stream);

}  // namespace dsa::sparse_mla_sm90
