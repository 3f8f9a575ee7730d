// Backward pass of the indexer on Hopper, the part that belongs to queries: dq and dw.
//
// A CTA's own rows are two queries of 64 heads, a warpgroup each; it streams the keys that either wants. dI of a query is the
// same for all its heads, so that an element is selected in two instructions a pair. w and dw stay out of the loop:
// dq = w sum_s m k and dw = q . sum_s m k.
#include "kernels/cuda/check.h"
#include "kernels/indexer_backward/sm90_kernel.cuh"

namespace dsa::indexer_backward_sm90 {
namespace {

struct Shared {
  alignas(1024) char own[kStageBytes];
  Tiles tiles;
  uint64_t full[kStages], free[kStages], own_full, own_free;
};

// Queries in pairs, those with the most keys (the last ones of a causal block) first.
struct Pair {
  int first_query, begin, tiles;  // keys from `begin` on; an even number of tiles
  Range range[2];

  __device__ __forceinline__ Pair(const Arguments& a, int item) {
    first_query = ((a.queries + 1) / 2 - 1 - item) * 2;
    int from = a.keys, to = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      range[i] = a.range(first_query + i);
      if (range[i].begin < range[i].end) from = min(from, range[i].begin), to = max(to, range[i].end);
    }
    begin = from & ~63;
    tiles = from < to ? (to - begin + 2 * kTile - 1) / (2 * kTile) * 2 : 0;
  }
};

__device__ void load_tiles(const Maps& maps, const Arguments& a, Shared& s) {
  Stage stage;
  uint32_t own_parity = 0;
  for (int item = blockIdx.x; item < (a.queries + 1) / 2; item += gridDim.x) {
    const Pair pair(a, item);
    if (pair.tiles == 0) continue;
    cuda::mbarrier_wait(&s.own_free, own_parity ^ 1);
    own_parity ^= 1;
    cuda::mbarrier_arrive_expect(&s.own_full, sizeof s.own);
    for (int p = 0; p < 2; ++p) cuda::tma_load_3d(s.own + p * kPanelBytes, &maps.q, &s.own_full, p * 64, 0, pair.first_query);
    for (int i = 0; i < pair.tiles; ++i, stage.next()) {
      const int key = pair.begin + i * kTile;
      uint64_t* full = &s.full[stage.index];
      cuda::mbarrier_wait(&s.free[stage.index], stage.parity ^ 1);
      cuda::mbarrier_arrive_expect(full, kStageBytes + 512);
      for (int p = 0; p < 2; ++p) {
        cuda::tma_load_2d(s.tiles.tile[stage.index] + p * kPanelBytes, &maps.k, full, p * 64, key);
        cuda::tma_load_2d(s.tiles.d[stage.index] + p * 256, &maps.d, full, key + p * 64, pair.first_query);
      }
    }
  }
}

__device__ void differentiate(const Arguments& a, Shared& s) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  const int head = threadIdx.x / 32 % 4 * 16 + lane / 4;
  const char* own = s.own + group * kGroupBytes;
  Stage stage;
  uint32_t own_parity = 0;
  for (int item = blockIdx.x; item < (a.queries + 1) / 2; item += gridDim.x) {
    const Pair pair(a, item);
    const int t = pair.first_query + group;
    const Range range = group == 0 ? pair.range[0] : pair.range[1];
    float sums[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] = 0;
    if (pair.tiles > 0) {
      cuda::mbarrier_wait(&s.own_full, own_parity);
      own_parity ^= 1;
    }
    for (int i = 0; i < pair.tiles; i += 2)
      two_tiles(sums, own, s.tiles, s.full, s.free, stage, [&](const float(&score)[64], int index, int which, uint32_t(&selected)[8][4]) {
        const int key = pair.begin + (i + which) * kTile;
        const uint32_t row = cuda::shared_address(s.tiles.d[index]) + group * 128;
        uint32_t d[16];
#pragma unroll
        for (int b = 0; b < 16; ++b) d[b] = load32((swizzled_row(row + b / 8 * 256) ^ (b % 8) << 4) + 4 * (lane % 4));
        if (key < range.begin || key + kTile > range.end) {
#pragma unroll
          for (int b = 0; b < 16; ++b) {
            const int at = key + 8 * b + 2 * (lane % 4);
            d[b] &= (at >= range.begin && at < range.end ? 0xFFFFu : 0u) | (at + 1 >= range.begin && at + 1 < range.end ? 0xFFFF0000u : 0u);
          }
        }
#pragma unroll
        for (int j = 0; j < 32; ++j)  // block j/2 of eight keys, row half j%2
          selected[j / 4][j % 4] = d[j / 2] & signs(score[2 * j], score[2 * j + 1]);
      });
    // dw of this lane's two heads; q as it lies in shared memory.
    float dw[2] = {0, 0};
    if (pair.tiles > 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t row = cuda::shared_address(own) + (head + 8 * h) * 128;
#pragma unroll
        for (int b = 0; b < 16; ++b) {
          const uint32_t q = load32((swizzled_row(row + b / 8 * kPanelBytes) ^ (b % 8) << 4) + 4 * (lane % 4));
          dw[h] = fmaf(__uint_as_float(q << 16), sums[4 * b + 2 * h], dw[h]);
          dw[h] = fmaf(__uint_as_float(q & 0xFFFF0000u), sums[4 * b + 2 * h + 1], dw[h]);
        }
        dw[h] += __shfl_xor_sync(~0u, dw[h], 1);
        dw[h] += __shfl_xor_sync(~0u, dw[h], 2);
      }
      arrive_once_a_warp(&s.own_free);
    }
    if (t >= a.queries) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = head + 8 * h;
      if (j >= a.heads) continue;
      const float w = __ldg(a.w + t * a.w_stride + j);
      const int64_t at = int64_t{t} * a.heads + j;
      if (lane % 4 == 0) a.dw[at] = dw[h];
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        const int64_t place = at * kDim + 8 * b + 2 * (lane % 4);
        const float x = w * sums[4 * b + 2 * h], y = w * sums[4 * b + 2 * h + 1];
        if (a.dq_bf16) *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(a.dq) + place) = pack(x, y);
        else *reinterpret_cast<float2*>(static_cast<float*>(a.dq) + place) = make_float2(x, y);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) backward_queries(const __grid_constant__ Maps maps, const Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      cuda::mbarrier_init(&s.full[i], 1);
      cuda::mbarrier_init(&s.free[i], 8);
    }
    cuda::mbarrier_init(&s.own_full, 1);
    cuda::mbarrier_init(&s.own_free, 8);
    cuda::mbarrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 2) {
    cuda::fewer_registers<24>();
    if (threadIdx.x == 256) load_tiles(maps, a, s);
  } else {
    cuda::more_registers<240>();
    differentiate(a, s);
  }
}

}  // namespace

void launch_queries(const Maps& maps, const Arguments& a, cudaStream_t stream) {
  cuda::check(cudaFuncSetAttribute(backward_queries, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
              "reserve shared memory for indexer_backward");
  const int pairs = (a.queries + 1) / 2, most = cuda::multiprocessors();
  backward_queries<<<pairs < most ? pairs : most, kThreads, sizeof(Shared), stream>>>(maps, a);
  cuda::check(cudaGetLastError(), "launch the query gradients of indexer_backward");
}

}  // namespace dsa::indexer_backward_sm90
