// dk and dv of dense attention; see sm90_backward.cuh.
//
// The products are transposed: S^T = k q^T has a row for each key, P^T and dS^T are left operands in registers. Rows are
// walked from the last one on, so that CTAs of one head, which run at a time, read the same rows from the L2 cache; the first
// keys, which most rows see, come first.
#include "kernels/cuda/async_copy.cuh"
#include "kernels/dense_mla/sm90_backward.cuh"

namespace dsa {
namespace dense_mla_sm90 {
namespace {

struct Shared {
  alignas(1024) char k[3 * kOwnPanel];
  alignas(1024) char v[2 * kOwnPanel];
  alignas(1024) char q[kStages][3 * kTilePanel];
  alignas(1024) char d_o[kStages][2 * kTilePanel];
  alignas(16) float bias[kStages][kTile], delta[kStages][kTile];
  int row[kStages];      // first of the tile; -1: no more
  bool whole[kStages];   // all its rows see all of the CTA's keys
  Barriers barriers;
};

// By one warp: 32 tiles are looked at at a time.
__device__ void copy_tiles(const Maps& maps, const Arguments& a, Shared& s, int key, int head) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) {
    cuda::mbarrier_arrive_expect(&s.barriers.own_full, sizeof s.k + sizeof s.v);
    load_rows<kOwnPanel>(s.k, s.v, &maps.k, &maps.v, &s.barriers.own_full, head, key);
  }
  Stage stage{0, 1};
  const int tiles = (a.queries + kTile - 1) / kTile;
  for (int last = tiles - 1; last >= 0; last -= 32) {
    const int own_tile = last - lane;
    Bounds b{0, 0, 0, 0};
    if (own_tile >= 0) b = a.bounds[own_tile];
    const bool seen = b.first < key + kOwn && b.last > key, whole = b.all_first <= key && b.all_last >= key + kOwn;
    const uint32_t wholes = __ballot_sync(~0u, whole);
    for (uint32_t left = __ballot_sync(~0u, seen); left; left &= left - 1) {
      const int n = __ffs(left) - 1;
      if (lane == 0) {
        const int row = (last - n) * kTile;
        const int64_t at = int64_t{head} * a.padded + row;
        cuda::mbarrier_wait(&s.barriers.free[stage.index], stage.parity);
        s.row[stage.index] = row, s.whole[stage.index] = wholes >> n & 1;
        cuda::mbarrier_arrive_expect(&s.barriers.full[stage.index], sizeof s.q[0] + sizeof s.d_o[0] + sizeof s.bias[0] + sizeof s.delta[0]);
        load_rows<kTilePanel>(s.q[stage.index], s.d_o[stage.index], &maps.q, &maps.d_o, &s.barriers.full[stage.index], head, row);
        cuda::bulk_load(s.bias[stage.index], a.bias + at, sizeof s.bias[0], &s.barriers.full[stage.index]);
        cuda::bulk_load(s.delta[stage.index], a.delta + at, sizeof s.delta[0], &s.barriers.full[stage.index]);
      }
      stage.next();
    }
  }
  if (lane != 0) return;
  cuda::mbarrier_wait(&s.barriers.free[stage.index], stage.parity);
  s.row[stage.index] = -1;
  cuda::mbarrier_arrive(&s.barriers.full[stage.index]);
}

__device__ void differentiate(const Arguments& a, Shared& s, int first_key, int head) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4;
  const int own_key = first_key + group * 64 + warp * 16 + lane / 4;
  const uint64_t k = cuda::operand_along_k(s.k + group * 64 * 128), v = cuda::operand_along_k(s.v + group * 64 * 128);
  float dk[96], dv[64];
#pragma unroll
  for (int i = 0; i < 96; ++i) dk[i] = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) dv[i] = 0;

  cuda::mbarrier_wait(&s.barriers.own_full, 0);
  Stage stage;
  while (true) {
    cuda::mbarrier_wait(&s.barriers.full[stage.index], stage.parity);
    const int row = s.row[stage.index];
    if (row < 0) break;
    uint32_t p[4][4];
    {
      float x[32];
      cuda::wgmma_fence();
      multiply<3>(x, k, cuda::operand_along_k(s.q[stage.index]));
      cuda::wgmma_commit();
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(x);
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        const float2 bias = *reinterpret_cast<const float2*>(s.bias[stage.index] + 8 * b + 2 * quad);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          x[4 * b + 2 * h] = cuda::exp2_approx(fmaf(x[4 * b + 2 * h], a.scale_log2, bias.x));
          x[4 * b + 2 * h + 1] = cuda::exp2_approx(fmaf(x[4 * b + 2 * h + 1], a.scale_log2, bias.y));
        }
      }
      if (!s.whole[stage.index]) {
#pragma unroll
        for (int b = 0; b < 8; ++b)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int t = min(row + 8 * b + 2 * quad + e, a.queries - 1), start = __ldg(a.start + t), end = __ldg(a.end + t);
#pragma unroll
            for (int h = 0; h < 2; ++h)
              if (own_key + 8 * h < start || own_key + 8 * h >= end) x[4 * b + 2 * h + e] = 0;
          }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n) p[j][n] = cuda::pack(x[accumulator(j, n)], x[accumulator(j, n) + 1]);
    }
    float dp[32];
    cuda::wgmma_fence();
    multiply<2>(dp, v, cuda::operand_along_k(s.d_o[stage.index]));
    cuda::wgmma_commit();
    const uint64_t across = cuda::operand_across_k(s.d_o[stage.index], kTilePanel);
#pragma unroll
    for (int j = 0; j < 4; ++j) cuda::wgmma_bf16_n128<true>(dv, p[j], across + 128 * j);
    cuda::wgmma_commit();
    cuda::wgmma_wait<1>();
    cuda::wgmma_settle(dp);
    uint32_t ds[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int i = accumulator(j, n);
        const float2 delta = *reinterpret_cast<const float2*>(s.delta[stage.index] + i / 4 * 8 + 2 * quad);
        ds[j][n] = cuda::pack(cuda::low_half(p[j][n]) * (dp[i] - delta.x), cuda::high_half(p[j][n]) * (dp[i + 1] - delta.y));
      }
    cuda::wgmma_fence();
    accumulate(dk, ds, s.q[stage.index]);
    cuda::wgmma_commit();
    cuda::wgmma_wait<0>();
    cuda::wgmma_settle(dv);
    cuda::wgmma_settle(dk);
    cuda::mbarrier_arrive(&s.barriers.free[stage.index]);
    stage.next();
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t at = own_key + 8 * h;
    if (at >= a.keys) continue;
    store(a.dk + (at * a.heads + head) * kDim, dk, h, a.scale);
    store(a.dv + (at * a.heads + head) * kValueDim, dv, h, 1);
  }
}

__global__ void __launch_bounds__(kThreads, 1) key_gradients(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int tiles = (a.keys + kOwn - 1) / kOwn, head = blockIdx.x / tiles, key = blockIdx.x % tiles * kOwn;
  if (threadIdx.x == 0) {
    s.barriers.init();
  }
  __syncthreads();
  if (threadIdx.x / 128 == 2) {
    cuda::fewer_registers<24>();
    if (threadIdx.x < 288) copy_tiles(maps, a, s, key, head);
  } else {
    cuda::more_registers<240>();
    differentiate(a, s, key, head);
  }
}

}  // namespace

void launch_keys(const Maps& maps, const Arguments& a, CUstream_st* stream) {
  launch<Shared>(key_gradients, (a.keys + kOwn - 1) / kOwn, "launch dense attention's key gradients", maps, a, stream);
}

}  // namespace dense_mla_sm90
}  // namespace dsa
