// Backward of sparse attention in latent form on Hopper, the part that belongs to queries: P, dS, dq and p_sel.
//
// A CTA takes 64 heads of a query and walks the list in tiles of 64 keys. Warpgroup 0 computes S, warpgroup 1 dO V^T; they
// swap halves, so that each turns 32 keys of both into P and dS. Both go to memory for the kernel that sums over queries;
// dS also meets the keys again: warpgroup 0 owns dq columns 0-287, warpgroup 1 columns 288-575, panel by panel, and a panel
// is refilled with the next tile's keys as soon as it is done. q, do and one tile fill the shared memory.
//
// Letters: T query rows, S keys, H heads, K list entries.
#include "kernels/cuda/check.h"
#include "kernels/sparse_mla/sm90_backward.h"
#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {
namespace {

constexpr int kThreads = 384;

struct Shared {
  alignas(1024) char q[kPanels * kPanelBytes];
  alignas(1024) char g[kValuePanels * kPanelBytes];
  alignas(1024) char kv[kPanels * kPanelBytes];
  alignas(1024) char weights[kWeightBytes];  // P, dS; before that the halves that the warpgroups swap
  float column_sums[4][kTile];
  uint2 mask;
  uint64_t full[kPanels], free[kPanels], q_full, q_free, g_full, g_free;
};

struct Arguments {
  Lists lists;
  int64_t first_row, rows;
  int heads, blocks;
  const char* kv;
  int64_t kv_bytes;
  float scale, scale_log2, share;  // share: 1 / heads
  const float *lse, *delta;        // [T,H]
  char* weights;
  __nv_bfloat16* dq;               // [T,H,576]
  float* p_sel;                    // [T,K], zero before
};

enum Named { kSwapped = 1, kTaken, kWritten };

// The order in which panels become free, and are filled and read again.
__device__ constexpr int panel_at(int i) { return i == 8 ? 4 : i % 2 ? 5 + i / 2 : i / 2; }

__device__ void gather_tiles(const CUtensorMap* map_q, const CUtensorMap* map_g, const Arguments& a, Shared& s) {
  const int thread = threadIdx.x - 256;
  uint32_t parity = 0, item_parity = 0;
  for (int64_t item = blockIdx.x; item < a.rows * a.blocks; item += gridDim.x) {
    const int64_t t = a.first_row + item / a.blocks;
    const int head = static_cast<int>(item % a.blocks) * kHeadBlock, length = a.lists.length(t), tiles = tiles_of(length);
    if (tiles == 0) continue;
    const int32_t* row = a.lists.indices + t * a.lists.stride;
    if (thread == 0) {
      cuda::mbarrier_wait(&s.q_free, item_parity ^ 1);
      cuda::mbarrier_arrive_expect(&s.q_full, kPanels * kPanelBytes);
      for (int p = 0; p < kPanels; ++p)
        cuda::tma_load_3d(s.q + p * kPanelBytes, map_q, &s.q_full, p * 64, head, static_cast<int>(t));
      cuda::mbarrier_wait(&s.g_free, item_parity ^ 1);
      cuda::mbarrier_arrive_expect(&s.g_full, kValuePanels * kPanelBytes);
      for (int p = 0; p < kValuePanels; ++p)
        cuda::tma_load_3d(s.g + p * kPanelBytes, map_g, &s.g_full, p * 64, head, static_cast<int>(t));
    }
    item_parity ^= 1;
    Entries next;
    next.load(row, 0, length, thread);
    for (int tile = 0; tile < tiles; ++tile, parity ^= 1) {
      Gather gather;
      gather.start(a.lists, next, a.kv, a.kv_bytes, thread);
      uint2 mask{0, 0};
      if (thread < 32) mask = next.mask(a.lists);
      next.load(row, (tile + 1) * kTile, length, thread);
      const uint32_t to = cuda::shared_address(s.kv);
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        const int p = panel_at(i);
        cuda::mbarrier_wait(&s.free[p], parity ^ 1);
        gather.copy_panel(to, p);
        if (i == 0 && thread == 0) s.mask = mask;
        cuda::mbarrier_arrive_after_copies(&s.full[p]);
        if (i == 0 && thread == 0) cuda::mbarrier_arrive(&s.full[p]);
      }
    }
  }
}

// Sums 8 columns over the eight lanes that share them; lane 4i + q is left with column i of quad place q.
__device__ __forceinline__ float sum_columns(float (&v)[8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 4, bit = 16; n > 0; n /= 2, bit /= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < n) {
        const bool high = lane & bit;
        const float mine = high ? v[i + n] : v[i], theirs = high ? v[i] : v[i + n];
        v[i] = mine + __shfl_xor_sync(~0u, theirs, bit);
      }
  return v[0];
}

template <int kGroup>
__device__ void differentiate(const Arguments& a, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % 128;
  const int head_row = warp * 16 + lane / 4;
  char* const weights = s.weights;
  char* const ds_tile = s.weights + kPanelBytes;
  float4* const give = reinterpret_cast<float4*>(s.weights + (1 - kGroup) * kPanelBytes) + thread;
  const float4* const take = reinterpret_cast<const float4*>(s.weights + kGroup * kPanelBytes) + thread;
  // ldmatrix: lane's row and chunk parity of A's 16 x 16 pieces.
  const int piece_row = warp * 16 + lane % 8 + (lane & 8), piece_chunk = lane >> 4;
  const uint32_t piece = cuda::shared_address(ds_tile) + piece_row * 128;
  const char* const left = kGroup == 0 ? s.q : s.g;
  uint32_t parity = 0, item_parity = 0;
  for (int64_t item = blockIdx.x; item < a.rows * a.blocks; item += gridDim.x) {
    const int64_t t = a.first_row + item / a.blocks;
    const int block = static_cast<int>(item % a.blocks), head = block * kHeadBlock + head_row;
    const int tiles = tiles_of(a.lists.length(t));
    float lse[2], delta[2];
    bool has[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      has[h] = head + 8 * h < a.heads;
      lse[h] = has[h] ? __ldg(a.lse + t * a.heads + head + 8 * h) * 1.4426950408889634f : INFINITY;
      delta[h] = has[h] ? __ldg(a.delta + t * a.heads + head + 8 * h) : 0.f;
    }
    float dq[4][32], dq_last[16];
#pragma unroll
    for (int i = 0; i < 128; ++i) dq[i / 32][i % 32] = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) dq_last[i] = 0;
    if (tiles > 0) {
      cuda::mbarrier_wait(kGroup == 0 ? &s.q_full : &s.g_full, item_parity);
      item_parity ^= 1;
    }
    for (int tile = 0; tile < tiles; ++tile, parity ^= 1) {
      float d[32];
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        const int p = panel_at(i);
        if (i % 3 == 0) {
          for (int j = i; j < i + 3; ++j) cuda::mbarrier_wait(&s.full[panel_at(j)], parity);
          cuda::fence_async_proxy();
          if (i == 0) cuda::wgmma_fence();
        }
        if (kGroup == 1 && p == 8) continue;
        const uint64_t x = cuda::operand_along_k(left + p * kPanelBytes), y = cuda::operand_along_k(s.kv + p * kPanelBytes);
#pragma unroll
        for (int j = 0; j < 4; ++j) cuda::wgmma_bf16_n64<false, false>(d, x + 2 * j, y + 2 * j, i + j > 0);
      }
      cuda::wgmma_commit();
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(d);
      if (tile + 1 == tiles) arrive_once_a_warp(kGroup == 0 ? &s.q_free : &s.g_free);

      // Warpgroup 0 keeps S of keys 0-31 and takes the other's dP of them; warpgroup 1 the same with keys 32-63.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int from = (1 - kGroup) * 16 + 4 * i;
        give[128 * i] = make_float4(d[from], d[from + 1], d[from + 2], d[from + 3]);
      }
      cuda::barrier_sync<kSwapped, 256>();
      float other[16];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 v = take[128 * i];
        other[4 * i] = v.x, other[4 * i + 1] = v.y, other[4 * i + 2] = v.z, other[4 * i + 3] = v.w;
      }
      const uint32_t mask = (kGroup == 0 ? s.mask.x : s.mask.y) >> (2 * (lane % 4));
      cuda::barrier_sync<kTaken, 256>();
      float columns[8];
#pragma unroll
      for (int b = 0; b < 4; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float p[2], ds[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int i = 4 * b + 2 * h + e;
            const float score = kGroup == 0 ? d[i] : other[i], dp = kGroup == 0 ? other[i] : d[16 + i];
            p[e] = mask >> (8 * b + e) & 1 ? exp2_fast(fmaf(score, a.scale_log2, -lse[h])) : 0.f;
            ds[e] = p[e] * (dp - delta[h]) * a.scale;
            columns[2 * b + e] = h == 0 ? p[e] : columns[2 * b + e] + p[e];
          }
          const int column = kGroup * 32 + 8 * b + 2 * (lane % 4);
          store_pair(weights, head_row + 8 * h, column, pack(p[0], p[1]));
          store_pair(ds_tile, head_row + 8 * h, column, pack(ds[0], ds[1]));
        }
      const float column_sum = sum_columns(columns);
      const int index = lane / 4;  // 2b + e: bit 16 of the lane chose the upper half first
      s.column_sums[warp][kGroup * 32 + 8 * (index / 2) + 2 * (lane % 4) + index % 2] = column_sum;
      cuda::fence_async_proxy();
      cuda::barrier_sync<kWritten, 256>();
      if (kGroup == 0 && thread == 0)
        cuda::bulk_store(a.weights + (((t - a.first_row) * (a.lists.k / kTile) + tile) * a.blocks + block) * kWeightBytes, weights,
                         kWeightBytes);
      uint32_t x[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) cuda::load_matrices(x[j], piece + (((2 * j + piece_chunk) ^ (piece_row & 7)) << 4));
      cuda::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t y = cuda::operand_across_k(s.kv + (kGroup * 5 + i) * kPanelBytes);
#pragma unroll
        for (int j = 0; j < 4; ++j) cuda::wgmma_bf16_n64<true>(dq[i], x[j], y + 128 * j);
        cuda::wgmma_commit();
      }
      const uint64_t y = cuda::operand_across_k(s.kv + 4 * kPanelBytes) + 4 * kGroup;
#pragma unroll
      for (int j = 0; j < 4; ++j) cuda::wgmma_bf16_n32<true>(dq_last, x[j], y + 128 * j);
      cuda::wgmma_commit();
      if (kGroup == 1 && thread < kTile) {
        const float sum = (s.column_sums[0][thread] + s.column_sums[1][thread]) + (s.column_sums[2][thread] + s.column_sums[3][thread]);
        atomicAdd(a.p_sel + t * a.lists.k + tile * kTile + thread, sum * a.share);  // two blocks at most: order is no matter
      }
      cuda::wgmma_wait<4>();
      arrive_once_a_warp(&s.free[kGroup * 5]);
      cuda::wgmma_wait<3>();
      arrive_once_a_warp(&s.free[kGroup * 5 + 1]);
      cuda::wgmma_wait<2>();
      arrive_once_a_warp(&s.free[kGroup * 5 + 2]);
      cuda::wgmma_wait<1>();
      if (kGroup == 0 && thread == 0) cuda::bulk_store_wait_read();  // nobody writes to the tiles before this panel is full again
      arrive_once_a_warp(&s.free[kGroup * 5 + 3]);
      cuda::wgmma_wait<0>();
      arrive_once_a_warp(&s.free[4]);
#pragma unroll
      for (int i = 0; i < 4; ++i) cuda::wgmma_settle(dq[i]);
      cuda::wgmma_settle(dq_last);
    }
    __nv_bfloat16* row = a.dq + (t * a.heads + head) * int64_t{kDim};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store_rows(dq[i], row + (kGroup * 5 + i) * 64, row + 8 * kDim + (kGroup * 5 + i) * 64, has[0], has[1], 1, 1);
    store_rows(dq_last, row + 256 + kGroup * 32, row + 8 * kDim + 256 + kGroup * 32, has[0], has[1], 1, 1);
  }
  if (kGroup == 0 && thread == 0) cuda::bulk_store_wait();
}

__global__ void __launch_bounds__(kThreads, 1)
    backward_queries(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_g, const Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    cuda::tma_prefetch_map(&map_q);
    cuda::tma_prefetch_map(&map_g);
    for (int p = 0; p < kPanels; ++p) {
      cuda::mbarrier_init(&s.full[p], p == 0 ? 129 : 128);
      cuda::mbarrier_init(&s.free[p], p == 4 ? 8 : 4);
    }
    cuda::mbarrier_init(&s.q_full, 1);
    cuda::mbarrier_init(&s.g_full, 1);
    cuda::mbarrier_init(&s.q_free, 4);
    cuda::mbarrier_init(&s.g_free, 4);
    cuda::mbarrier_init_fence();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 2) {
    cuda::fewer_registers<56>();
    gather_tiles(&map_q, &map_g, a, s);
  } else {
    cuda::more_registers<224>();
    if (group == 0) differentiate<0>(a, s);
    else differentiate<1>(a, s);
  }
}

}  // namespace

void launch_queries(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g, const Chunk& chunk,
                    cudaStream_t stream) {
  const int blocks = (p.heads + kHeadBlock - 1) / kHeadBlock;
  const Arguments a{{p.indices, p.indices_stride, p.lengths, p.k, static_cast<int>(p.keys)},
                    chunk.first_row, chunk.rows, p.heads, blocks, static_cast<const char*>(p.kv), p.kv_stride * 2,
                    p.scale, p.scale * 1.4426950408889634f, 1.f / p.heads, p.lse, p.delta, chunk.weights,
                    static_cast<__nv_bfloat16*>(p.dq), p.p_sel};
  cuda::check(cudaFuncSetAttribute(backward_queries, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
              "reserve shared memory for sparse_mla backward");
  const int64_t items = chunk.rows * blocks, most = chunk.multiprocessors;
  backward_queries<<<static_cast<int>(items < most ? items : most), kThreads, sizeof(Shared), stream>>>(map_q, map_g, a);
  cuda::check(cudaGetLastError(), "launch sparse_mla backward");
}

}  // namespace dsa::sparse_mla_sm90
