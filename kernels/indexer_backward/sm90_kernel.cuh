// What the two kernels of the indexer's backward pass on Hopper share; see params.h for the formula.
//
// A CTA holds 128 rows of its own (two queries of 64 heads, or 128 keys), 64 a warpgroup, and streams tiles of 128 rows of
// the other kind (128 keys, or two queries of 64 heads) past them. A tile meets them twice: S = -(own . tile^T), whose sign bit
// is set exactly where q.k > 0 and selects the elements of dI; the selected elements, in the registers where S was, are then
// the left operand of sums += selected . tile. Two tiles are in hand at a time: while one is selected on the general cores,
// the tensor core works on the other. A warp of a third warpgroup keeps a ring of tiles full.
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
constexpr int kTile = 128;                    // rows of a streamed tile, and a CTA's own
constexpr int kPanelBytes = kTile * 128;      // 64 columns of a tile, 128-byte swizzled
constexpr int kStageBytes = 2 * kPanelBytes;
constexpr int kGroupBytes = 64 * 128;         // a warpgroup's own rows in a panel
constexpr int kStages = 5;
constexpr int kThreads = 384;

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

  __device__ __forceinline__ Range range(int t) const {
    if (t >= queries) return {0, 0};
    const int from = start ? max(__ldg(start + t), 0) : 0, to = end ? min(__ldg(end + t), keys) : keys;
    return from < to ? Range{from, to} : Range{0, 0};
  }
};

// Queries of the launch, padded to 64 heads, in boxes of two; keys in boxes of 128; dI in boxes of two queries x 64 keys.
struct Maps {
  CUtensorMap q, k, d;
};

// Of a stage: dI of two queries and 128 keys lies as two panels of 64 keys x two rows of 128 bytes.
struct Tiles {
  alignas(1024) char tile[kStages][kStageBytes];
  alignas(1024) char d[kStages][512];
};

__device__ __forceinline__ uint32_t load32(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}
__device__ __forceinline__ float load_bf16(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(address));
  return __uint_as_float(uint32_t{x} << 16);
}
__device__ __forceinline__ float4 load_float4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address));
  return x;
}

/// Where 16-byte chunk 0 of a swizzled row of 128 bytes lies; chunk c: xor with c << 4.
__device__ __forceinline__ uint32_t swizzled_row(uint32_t row) { return row ^ (row >> 3 & 0x70); }

/// 0xFFFF in the half of each argument whose sign bit is set.
__device__ __forceinline__ uint32_t signs(float low, float high) {
  uint32_t x;
  asm("prmt.b32 %0, %1, %2, 0xFFBB;" : "=r"(x) : "r"(__float_as_uint(low)), "r"(__float_as_uint(high)));
  return x;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}

__device__ __forceinline__ void arrive_once_a_warp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) cuda::mbarrier_arrive(barrier);
}

/// s = -(own . tile^T), 64 x 128. own: a warpgroup's rows in the first panel of a tile.
__device__ __forceinline__ void negative_scores(float (&s)[64], const char* own, const char* tile) {
  cuda::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 8; ++i)
    cuda::wgmma_bf16_n128<false, false, -1>(s, cuda::operand_along_k(own + i / 4 * kPanelBytes) + 2 * (i % 4),
                                            cuda::operand_along_k(tile + i / 4 * kPanelBytes) + 2 * (i % 4), i > 0);
  cuda::wgmma_commit();
}

/// sums += selected . tile, 64 x 128.
__device__ __forceinline__ void add_selected(float (&sums)[64], const uint32_t (&selected)[8][4], const char* tile) {
  cuda::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 8; ++i) cuda::wgmma_bf16_n128<true>(sums, selected[i], cuda::operand_across_k(tile, kPanelBytes) + 128 * i);
  cuda::wgmma_commit();
}

struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

/// Two tiles: select(s, stage, which, selected) turns scores into selected elements of dI.
template <class Select>
__device__ __forceinline__ void two_tiles(float (&sums)[64], const char* own, Tiles& tiles, uint64_t* full, uint64_t* free, Stage& stage,
                                          const Select& select) {
  float first[64], second[64];
  const int a = stage.index;
  cuda::mbarrier_wait(&full[a], stage.parity);
  negative_scores(first, own, tiles.tile[a]);
  stage.next();
  const int b = stage.index;
  cuda::mbarrier_wait(&full[b], stage.parity);
  negative_scores(second, own, tiles.tile[b]);
  stage.next();
  uint32_t selected_first[8][4], selected_second[8][4];
  cuda::wgmma_wait<1>();
  cuda::wgmma_settle(first);
  select(first, a, 0, selected_first);
  add_selected(sums, selected_first, tiles.tile[a]);
  cuda::wgmma_wait<1>();
  cuda::wgmma_settle(second);
  select(second, b, 1, selected_second);
  add_selected(sums, selected_second, tiles.tile[b]);
  cuda::wgmma_wait<1>();
  arrive_once_a_warp(&free[a]);
  cuda::wgmma_wait<0>();
  arrive_once_a_warp(&free[b]);
  cuda::wgmma_settle(sums);
}

void launch_queries(const Maps& maps, const Arguments& a, cudaStream_t stream);
/// workspace: keys_workspace_bytes, 16-byte aligned.
void launch_keys(const Maps& maps, const Arguments& a, void* workspace, cudaStream_t stream);
size_t keys_workspace_bytes(int64_t keys, int multiprocessors);

}  // namespace dsa::indexer_backward_sm90
