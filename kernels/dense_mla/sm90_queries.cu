// dq of dense attention, and what the kernel of the keys needs of each row; see sm90_backward.cuh.
//
// CTAs that run at a time have neighbouring rows of one head and read the same keys from the L2 cache; the last rows, which
// have most keys, come first.
#include <climits>

#include "kernels/dense_mla/sm90_backward.cuh"

namespace dsa {
namespace dense_mla_sm90 {
namespace {

struct Shared {
  alignas(1024) char q[3 * kOwnPanel];
  alignas(1024) char d_o[2 * kOwnPanel];
  alignas(1024) char k[kStages][3 * kTilePanel];
  alignas(1024) char v[kStages][2 * kTilePanel];
  Barriers barriers;
  Bounds bounds;  // of all rows
};

__device__ void copy_tiles(const Maps& maps, Shared& s, int row, int head) {
  cuda::mbarrier_arrive_expect(&s.barriers.own_full, sizeof s.q + sizeof s.d_o);
  load_rows<kOwnPanel>(s.q, s.d_o, &maps.q, &maps.d_o, &s.barriers.own_full, head, row);
  Stage stage{0, 1};
  for (int key = s.bounds.first / kTile * kTile; key < s.bounds.last; key += kTile) {
    cuda::mbarrier_wait(&s.barriers.free[stage.index], stage.parity);
    cuda::mbarrier_arrive_expect(&s.barriers.full[stage.index], sizeof s.k[0] + sizeof s.v[0]);
    load_rows<kTilePanel>(s.k[stage.index], s.v[stage.index], &maps.k, &maps.v, &s.barriers.full[stage.index], head, key);
    stage.next();
  }
}

/// Of 32 columns.
__device__ __forceinline__ float dot(const __nv_bfloat16* x, const __nv_bfloat16* y) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 a = __ldg(reinterpret_cast<const uint4*>(x) + i), b = __ldg(reinterpret_cast<const uint4*>(y) + i);
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum = fmaf(cuda::low_half(left[j]), cuda::low_half(right[j]), sum);
      sum = fmaf(cuda::high_half(left[j]), cuda::high_half(right[j]), sum);
    }
  }
  return sum;
}

__device__ void differentiate(const Arguments& a, Shared& s, int first_row, int head) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4;
  const int own_row = first_row + group * 64 + warp * 16 + lane / 4;
  float bias[2], delta[2];
  int start[2], end[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = own_row + 8 * h;
    const int64_t t = min(row, a.queries - 1);
    const auto quarter = [&](const DenseMlaOperand& x) {
      return static_cast<const __nv_bfloat16*>(x.data) + t * x.stride + head * x.head_stride + 32 * quad;
    };
    start[h] = __ldg(a.start + t), end[h] = __ldg(a.end + t);
    bias[h] = -kLog2e * __ldg(a.lse + t * a.heads + head);
    delta[h] = dot(quarter(a.o), quarter(a.d_o));
    delta[h] += __shfl_xor_sync(~0u, delta[h], 1);
    delta[h] += __shfl_xor_sync(~0u, delta[h], 2);
    if (quad == 0) {
      const int64_t at = int64_t{head} * a.padded + row;
      const bool real = row < a.queries;  // the others are rows of zeros to the copy engine
      a.bias[at] = real ? bias[h] : 0, a.delta[at] = real ? delta[h] : 0;
    }
  }
  const uint64_t q = cuda::operand_along_k(s.q + group * 64 * 128), d_o = cuda::operand_along_k(s.d_o + group * 64 * 128);
  float dq[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) dq[i] = 0;

  cuda::mbarrier_wait(&s.barriers.own_full, 0);
  const Bounds bounds = s.bounds;
  Stage stage;
  for (int key = bounds.first / kTile * kTile; key < bounds.last; key += kTile) {
    cuda::mbarrier_wait(&s.barriers.full[stage.index], stage.parity);
    float x[32], dp[32];
    cuda::wgmma_fence();
    multiply<3>(x, q, cuda::operand_along_k(s.k[stage.index]));
    cuda::wgmma_commit();
    multiply<2>(dp, d_o, cuda::operand_along_k(s.v[stage.index]));
    cuda::wgmma_commit();
    cuda::wgmma_wait<1>();
    cuda::wgmma_settle(x);
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] = cuda::exp2_approx(fmaf(x[i], a.scale_log2, bias[i / 2 % 2]));
    if (key < bounds.all_first || key + kTile > bounds.all_last) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int own_key = key + i / 4 * 8 + quad * 2 + i % 2;
        if (own_key < start[i / 2 % 2] || own_key >= end[i / 2 % 2]) x[i] = 0;
      }
    }
    cuda::wgmma_wait<0>();
    cuda::wgmma_settle(dp);
    uint32_t ds[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int i = accumulator(j, n);
        ds[j][n] = cuda::pack(x[i] * (dp[i] - delta[n % 2]), x[i + 1] * (dp[i + 1] - delta[n % 2]));
      }
    cuda::wgmma_fence();
    accumulate(dq, ds, s.k[stage.index]);
    cuda::wgmma_commit();
    cuda::wgmma_wait<0>();
    cuda::wgmma_settle(dq);
    cuda::mbarrier_arrive(&s.barriers.free[stage.index]);
    stage.next();
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t t = own_row + 8 * h;
    if (t >= a.queries) continue;
    store(a.dq + (t * a.heads + head) * kDim, dq, h, a.scale);
  }
}

__global__ void __launch_bounds__(kThreads, 1) query_gradients(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int tiles = a.padded / kOwn, head = blockIdx.x / tiles, tile = tiles - 1 - blockIdx.x % tiles;
  if (threadIdx.x == 0) {
    const Bounds one = a.bounds[2 * tile], other = a.bounds[2 * tile + 1];
    s.bounds = {min(one.first, other.first), max(one.last, other.last), max(one.all_first, other.all_first),
                min(one.all_last, other.all_last)};
    s.barriers.init();
  }
  __syncthreads();
  if (threadIdx.x / 128 == 2) {
    cuda::fewer_registers<40>();
    if (threadIdx.x == 256) copy_tiles(maps, s, tile * kOwn, head);
  } else {
    cuda::more_registers<232>();
    differentiate(a, s, tile * kOwn, head);
  }
}

}  // namespace

void launch_queries(const Maps& maps, const Arguments& a, CUstream_st* stream) {
  launch<Shared>(query_gradients, a.padded / kOwn, "launch dense attention's query gradient", maps, a, stream);
}

}  // namespace dense_mla_sm90
}  // namespace dsa
