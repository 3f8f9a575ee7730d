// What the two kernels of the indexer's backward pass on Hopper share; see params.h for the formula.
//
// Both hold rows of their own and stream tiles of 128 rows of the other kind past them: the kernel of the queries two queries
// of 64 heads against keys, the kernel of the keys 256 keys against queries. The first forms q.k and leaves a bit for every
// query, head and key, 1 where q.k > 0; the second needs no product but its sums. A launch goes over blocks of query rows,
// as many as their bits fit into the workspace.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/indexer_backward/params.h"

namespace dsa::indexer_backward_sm90 {

constexpr int kDim = 128;
constexpr int kHeads = 64;                    // a query's heads, padded with zeros by the copy engine
constexpr int kTile = 128;                    // rows of a streamed tile: keys, or (query, head)
constexpr int kPanelBytes = kTile * 128;      // 64 columns of a tile, 128-byte swizzled
constexpr int kTileBytes = 2 * kPanelBytes;
constexpr int kStages = 5;
constexpr int kThreads = 384;

// Bits of two queries and a tile of keys, [query][head/8][key/2%4][head%8] words: bit 31 - 2b - e is key 8b + 2(key/2%4) + e.
constexpr int kQueryWords = kHeads * kTile / 32;
constexpr int kPairWords = 2 * kQueryWords;

struct Range {
  int begin, end;
};

struct Arguments {
  int queries, keys, heads;
  const float* w;              // [T,J]
  int64_t w_stride;
  const int32_t *start, *end;  // [T] or null
  void* dq;                    // [T,J,128]
  bool dq_bf16;
  float *dw, *dk;              // [T,J], [S,128]
  uint32_t* bits;              // [pairs of queries][key tiles, an even number][kPairWords]

  __device__ __forceinline__ Range range(int t) const {
    if (t >= queries) return {0, 0};
    const int from = start ? max(__ldg(start + t), 0) : 0, to = end ? min(__ldg(end + t), keys) : keys;
    return from < to ? Range{from, to} : Range{0, 0};
  }
  __device__ __forceinline__ int bit_tiles() const { return (keys + 2 * kTile - 1) / (2 * kTile) * 2; }
  __device__ __forceinline__ uint32_t* bits_of(int pair, int tile) const { return bits + (int64_t{pair} * bit_tiles() + tile) * kPairWords; }
};

// Queries of the launch in boxes of two with 64 heads; keys in boxes of 128; dI in boxes of two queries x 32 keys.
struct Maps {
  CUtensorMap q, k, d;
};

__device__ __forceinline__ uint32_t load32(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

__device__ __forceinline__ float2 load_two(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
  return x;
}

/// Where 16-byte chunk 0 of a swizzled row of 128 bytes lies; chunk c: xor with c << 4.
__device__ __forceinline__ uint32_t swizzled_row(uint32_t row) { return row ^ (row >> 3 & 0x70); }

/// 0xFFFF in the half of each argument whose top bit is set.
__device__ __forceinline__ uint32_t signs(uint32_t low, uint32_t high) {
  uint32_t x;
  asm("prmt.b32 %0, %1, %2, 0xFFBB;" : "=r"(x) : "r"(low), "r"(high));
  return x;
}

using cuda::pack;

// Every lane that reads a buffer arrives at the barrier that frees it: compute-sanitizer credits an arrival to its lane alone.
constexpr int kReaders = 256;

using Stage = cuda::Stage<kStages>;

void launch_queries(const Maps& maps, const Arguments& a, cudaStream_t stream);
/// workspace: keys_workspace_bytes, 16-byte aligned.
void launch_keys(const Maps& maps, const Arguments& a, void* workspace, cudaStream_t stream);
size_t keys_workspace_bytes(int64_t keys, int multiprocessors);

}  // namespace dsa::indexer_backward_sm90
