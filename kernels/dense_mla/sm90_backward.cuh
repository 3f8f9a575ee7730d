// What the two kernels of dense attention's backward pass share; see params.h for the formulas.
//
// The kernel of the queries has 128 rows a CTA and walks their keys, that of the keys 128 keys and walks the rows that see
// them, both in tiles of 64. What a CTA owns stays in shared memory, one thread copies tiles ahead, two warpgroups have 64
// rows (keys) each. While one makes P and dS, the tensor core multiplies for the other.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/dense_mla/params.h"

namespace dsa {
namespace dense_mla_sm90 {

constexpr int kDim = 192, kValueDim = 128;  // 3 and 2 panels of 64 columns
constexpr int kOwn = 128, kTile = 64;       // rows or keys of a CTA, and of a tile that it walks
constexpr int kOwnPanel = kOwn * 128, kTilePanel = kTile * 128;
constexpr int kStages = 3;
constexpr int kThreads = 384;
constexpr float kLog2e = 1.4426950408889634f;

// Of 64 rows: keys that some row sees, [first, last), and keys that every row sees.
struct alignas(16) Bounds {
  int first, last, all_first, all_last;
};

struct Arguments {
  int queries, keys, heads;
  float scale, scale_log2;
  DenseMlaOperand o, d_o;
  const float* lse;
  const int32_t *start, *end;
  __nv_bfloat16 *dq, *dk, *dv;
  // Of each head, rows padded to a multiple of 128: -lse log2(e), and delta; the queries' kernel leaves them to the keys'.
  int padded;
  float *bias, *delta;
  Bounds* bounds;
};

struct Maps {  // boxes of 128 or of 64 rows
  CUtensorMap q, d_o, k, v;
};

// Of what a CTA owns, and of the tiles: filled by the copy engine, freed by the 256 lanes that multiply.
struct Barriers {
  uint64_t own_full, full[kStages], free[kStages];

  __device__ void init() {
    cuda::mbarrier_init(&own_full, 1);
    for (int i = 0; i < kStages; ++i) cuda::mbarrier_init(&full[i], 1), cuda::mbarrier_init(&free[i], 256);
    cuda::mbarrier_init_fence();
  }
};
using Stage = cuda::Stage<kStages>;

void launch_queries(const Maps& maps, const Arguments& a, CUstream_st* stream);
void launch_keys(const Maps& maps, const Arguments& a, CUstream_st* stream);

/// 192 and 128 columns of the same rows: [first, first + rows of the box).
template <int panel_bytes>
__device__ __forceinline__ void load_rows(char* wide, char* narrow, const CUtensorMap* map_wide, const CUtensorMap* map_narrow,
                                          uint64_t* barrier, int head, int first) {
  for (int p = 0; p < 3; ++p) cuda::tma_load_3d(wide + p * panel_bytes, map_wide, barrier, p * 64, head, first);
  for (int p = 0; p < 2; ++p) cuda::tma_load_3d(narrow + p * panel_bytes, map_narrow, barrier, p * 64, head, first);
}

/// x = A B^T, 64 x 64, over 64 panels columns: A 64 of a CTA's own rows, B a tile.
template <int panels>
__device__ __forceinline__ void multiply(float (&x)[32], uint64_t own, uint64_t tile) {
#pragma unroll
  for (int i = 0; i < 4 * panels; ++i)
    cuda::wgmma_bf16_n64<false, false>(x, own + i / 4 * (kOwnPanel / 16) + i % 4 * 2, tile + i / 4 * (kTilePanel / 16) + i % 4 * 2,
                                       i > 0);
}

/// sum += A tile, A 64 x 64 in registers, the tile's 64 rows summed over: 192 columns.
__device__ __forceinline__ void accumulate(float (&sum)[96], const uint32_t (&a)[4][4], const char* tile) {
#pragma unroll
  for (int j = 0; j < 4; ++j) cuda::wgmma_bf16_n192<true>(sum, a[j], cuda::operand_across_k(tile, kTilePanel) + 128 * j);
}

/// The accumulator that pairs with its next neighbour in register n of the left operand's step j.
__device__ __forceinline__ constexpr int accumulator(int j, int n) { return 8 * j + n / 2 * 4 + n % 2 * 2; }

/// Columns 8b + 2(lane % 4) and the next of row h of the accumulators' pair, times scale.
template <int n>
__device__ __forceinline__ void store(__nv_bfloat16* row, const float (&x)[n], int h, float scale) {
#pragma unroll
  for (int b = 0; b < n / 4; ++b)
    *reinterpret_cast<uint32_t*>(row + 8 * b + 2 * (threadIdx.x % 4)) = cuda::pack(scale * x[4 * b + 2 * h], scale * x[4 * b + 2 * h + 1]);
}

/// A CTA for each 128 rows or keys of each head.
template <class Shared, class Kernel>
void launch(Kernel kernel, int64_t tiles, const char* what, const Maps& maps, const Arguments& a, CUstream_st* stream) {
  constexpr int kBytes = sizeof(Shared);
  static_assert(kBytes <= 227 * 1024, "more than a Hopper block may have");
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), what);
  kernel<<<static_cast<unsigned>(tiles * a.heads), kThreads, kBytes, stream>>>(maps, a);
  cuda::check(cudaGetLastError(), what);
}

}  // namespace dense_mla_sm90
}  // namespace dsa
