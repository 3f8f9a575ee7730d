// What the Hopper kernels of sparse_mla share: which list entries count, the gather of a tile of 64 listed keys,
// rows of results. A tile lies in shared memory as nine panels of 64 keys x 64 columns, 128-byte swizzled; panel 8 is
// rope.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/sparse_mla/params.h"

namespace dsa::sparse_mla_sm90 {

constexpr int kTile = 64;         // keys
constexpr int kHeadBlock = 64;    // heads of a CTA
constexpr int kPanels = 9;        // of 64 columns in 576
constexpr int kValuePanels = 8;   // of 64 columns in 512
constexpr int kPanelBytes = 64 * 128;
constexpr int kDim = 576, kLatent = 512;

struct Lists {
  const int32_t* indices;  // [T,K]
  int64_t stride;
  const int32_t* lengths;  // [T] or null
  int k, keys;

  __device__ __forceinline__ int length(int64_t t) const { return lengths ? min(max(__ldg(lengths + t), 0), k) : k; }
  /// The key if it counts after the entry before it, else -1.
  __device__ __forceinline__ int counting(int key, int before) const {
    return key >= 0 && key < keys && key > before ? key : -1;
  }
};

/// The list entries that a thread of a producing warpgroup needs of a tile, loaded one tile ahead of their use.
struct Entries {
  int key[4];               // of rows thread/8 + 16j
  int own[2], before[2];    // first warp: of rows lane and lane + 32

  __device__ __forceinline__ void load(const int32_t* row, int first, int length, int thread) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = first + thread / 8 + 16 * j;
      key[j] = i < length ? __ldg(row + i) : -1;
    }
    if (thread >= 32) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int i = first + thread + 32 * j;
      own[j] = i < length ? __ldg(row + i) : -1;
      before[j] = i > 0 && i < length ? __ldg(row + i - 1) : -1;
    }
  }
  /// The entries of the tile that count, as bits; by the first warp.
  __device__ __forceinline__ uint2 mask(const Lists& lists) const {
    return {__ballot_sync(~0u, lists.counting(own[0], before[0]) >= 0),
            __ballot_sync(~0u, lists.counting(own[1], before[1]) >= 0)};
  }
};

/// A producing warpgroup's view of a tile: thread i copies 16 bytes of rows i/8 + 16j of each panel.
struct Gather {
  const char* from[4];
  uint32_t to[4];
  bool read[4];

  __device__ __forceinline__ void start(const Lists& lists, const Entries& entries, const char* kv, int64_t kv_bytes,
                                        int thread) {
    const int chunk = thread % 8;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = thread / 8 + 16 * j, key = entries.key[j];
      read[j] = key >= 0 && key < lists.keys;
      from[j] = kv + (read[j] ? key * kv_bytes : 0) + chunk * 16;
      to[j] = r * 128 + ((chunk ^ (r & 7)) << 4);
    }
  }
  __device__ __forceinline__ void copy_panel(uint32_t tile, int panel) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      cuda::copy16_or_zero(tile + panel * kPanelBytes + to[j], from[j] + panel * 128, read[j]);
  }
};

__device__ __forceinline__ int tiles_of(int length) { return (length + kTile - 1) / kTile; }

using cuda::exp2_approx;
using cuda::pack;

/// Words w[b] of the four lanes of a quad, transposed: lane q is left with word q of each lane, in order.
__device__ __forceinline__ uint4 transpose_quad(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t p0 = __shfl_xor_sync(~0u, odd ? w0 : w1, 1), p1 = __shfl_xor_sync(~0u, odd ? w2 : w3, 1);
  const uint32_t a0 = odd ? p0 : w0, a1 = odd ? w1 : p0, a2 = odd ? p1 : w2, a3 = odd ? w3 : p1;
  const uint32_t b0 = __shfl_xor_sync(~0u, high ? a0 : a2, 2), b1 = __shfl_xor_sync(~0u, high ? a1 : a3, 2);
  return high ? make_uint4(b0, b1, a2, a3) : make_uint4(a0, a1, b0, b1);
}

/// Stores n/4 accumulator groups of eight columns as bf16, rows r and r + 8 of this lane; by whole warps. A quad writes
/// 64 contiguous bytes. row: the first column, 16-byte aligned.
template <int n>
__device__ __forceinline__ void store_rows(const float (&d)[n], __nv_bfloat16* row, __nv_bfloat16* row8, bool has,
                                           bool has8, float scale, float scale8) {
#pragma unroll
  for (int i = 0; i < n / 16; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float by = h ? scale8 : scale;
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = pack(d[16 * i + 4 * j + 2 * h] * by, d[16 * i + 4 * j + 2 * h + 1] * by);
      const uint4 out = transpose_quad(w[0], w[1], w[2], w[3]);
      if (h ? has8 : has) *reinterpret_cast<uint4*>((h ? row8 : row) + 32 * i + 8 * (threadIdx.x % 4)) = out;
    }
}

}  // namespace dsa::sparse_mla_sm90
