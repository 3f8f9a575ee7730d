// One entry of the indexer's loss, what a row knows about itself, and the layout of the workspace; see params.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/pace.cuh"
#include "kernels/indexer_kl/params.h"

namespace dsa::indexer_kl_sm90 {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

constexpr int kTileRows = 128, kTileKeys = 256;  // of a block; its partial sums are written once a tile
constexpr int kRowShare = 2;                     // blocks of a cluster: the same keys, neighbouring rows
constexpr int kClusterRows = kTileRows * kRowShare;

using cuda::exp2_approx;

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct Range {
  int begin, end;
};
__device__ __forceinline__ Range row_range(const int32_t* start, const int32_t* end, int64_t t, int64_t rows, int keys) {
  if (t >= rows) return {0, 0};
  const int a = start ? max(__ldg(start + t), 0) : 0, b = end ? min(__ldg(end + t), keys) : keys;
  return a < b ? Range{a, b} : Range{0, 0};
}

/// What a pass over the row's scores finds: their log-sum-exp, and the least selected score with its last index.
struct RowScores {
  float lse, edge;
  int last_tie;
  int padding;
};

struct Sums {
  float kl, target, prediction, recall;
};

struct Row {
  RowScores scores;
  Range range;
  float weight;  // times the loss scale
  bool one_key;

  __device__ __forceinline__ Row(const RowScores* scores_of, const float* row_weight, float loss_scale, Range range, int64_t t)
      : range(range), one_key(range.end - range.begin == 1) {
    if (range.begin == range.end) return;
    const int4 bits = __ldg(reinterpret_cast<const int4*>(scores_of + t));
    scores = {__int_as_float(bits.x), __int_as_float(bits.y), bits.z, 0};
    weight = loss_scale * (row_weight ? __ldg(row_weight + t) : 1.f);
  }

  /// Adds an entry's share to the sums; returns dI.
  __device__ __forceinline__ float add(float p, float score, int s, Sums& sums) const {
    if (s < range.begin || s >= range.end) return 0.f;
    if (one_key) p = 1.f;
    const float log_q = score - scores.lse, q = exp2_approx(log_q * kLog2e);
    const float log_p = p > 0.f ? log2_approx(p) * kLn2 : 0.f;
    sums.kl = fmaf(p, log_p - log_q, sums.kl);
    sums.target = fmaf(-p, log_p, sums.target);
    sums.prediction = fmaf(-q, log_q, sums.prediction);
    if (score > scores.edge || (score == scores.edge && s <= scores.last_tie)) sums.recall += p;
    return (q - p) * weight;
  }
};

/// A cluster's work: rows from kClusterRows * x on, keys from kTileKeys * y on.
using Tile = int2;

struct Workspace {
  int* tile_count;
  int* pace;           // [Pace::kCounters], zero before the tiles are worked on
  Tile* tiles;
  RowScores* scores;   // [T]
  Sums* partial_sums;  // [T][key_tiles]
  int64_t key_tiles, bytes;

  Workspace(void* base, int64_t queries, int64_t keys) : key_tiles((keys + kTileKeys - 1) / kTileKeys) {
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      void* const p = static_cast<char*>(base) + at;
      at += (size + 255) / 256 * 256;
      return p;
    };
    tile_count = static_cast<int*>(take(sizeof(int)));
    pace = static_cast<int*>(take(cuda::Pace::kCounters * sizeof(int)));
    tiles = static_cast<Tile*>(take((queries + kClusterRows - 1) / kClusterRows * key_tiles * sizeof(Tile)));
    scores = static_cast<RowScores*>(take(queries * sizeof(RowScores)));
    partial_sums = static_cast<Sums*>(take(queries * key_tiles * sizeof(Sums)));
    bytes = at;
  }
};

/// Enqueue: scores of every row; the sums of the tiles of every row into its outputs; the list of tiles in which some row
/// has keys, in an order that keeps neighbours in the L2 cache, and the pace at zero.
void launch_row_scores(const AttentionMassParams& p, const DenseKlRows& rows, const Workspace& w);
void launch_row_sums(const AttentionMassParams& p, const DenseKlRows& rows, const Workspace& w);
void launch_tile_list(const AttentionMassParams& p, const Workspace& w);

/// Throws unless the rows can be worked on.
void check_rows(const AttentionMassParams& p, const DenseKlRows& rows);
void check_workspace(const AttentionMassParams& p);

}  // namespace dsa::indexer_kl_sm90
