// Backward pass of the indexer on Hopper, the part that belongs to queries: dq and dw.
//
// A CTA's own rows are two queries of 64 heads, a warpgroup each; it streams the keys that either wants. A tile of keys
// meets them twice: S = -(own . tile^T), whose sign bit is set exactly where q.k > 0 and selects the elements of dI,
// rounded to bf16, the same for all heads of a query; the selected elements, in the registers where S was, are then the
// left operand of sums += selected . tile. w and dw stay out of the loop: dq = w sum_s m k and dw = q . sum_s m k. Two
// tiles are in hand at a time: while one is selected on the general cores, the tensor core works on the other. In a third
// warpgroup a thread keeps a ring of tiles full, and a warp a query rounds dI.
#include "kernels/cuda/check.h"
#include "kernels/indexer_backward/sm90_kernel.cuh"

namespace dsa::indexer_backward_sm90 {
namespace {

constexpr int kGroupBytes = 64 * 128;  // a warpgroup's own rows in a panel

// dI of a tile and a query as bf16: for l % 4 = 0 to 3 the pairs of keys that lanes l select, and a gap for the banks.
constexpr int kLaneBytes = 16 * 4, kLaneStride = kLaneBytes + 16;

struct Shared {
  alignas(1024) char own[kTileBytes];
  alignas(1024) char tile[kStages][kTileBytes];
  alignas(1024) char d[kStages][1024];  // dI: four panels of 32 keys, two rows of 128 bytes
  alignas(16) char rounded[kStages][2][4 * kLaneStride];
  uint64_t full[kStages], free[kStages], rounded_full[kStages], own_full, own_free;
};

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

/// Two tiles: select(s, stage, which, selected) turns scores into selected elements of dI.
template <class Select>
__device__ __forceinline__ void two_tiles(float (&sums)[64], const char* own, Shared& s, Stage& stage, const Select& select) {
  float first[64], second[64];
  const Stage a = stage;
  cuda::mbarrier_wait(&s.full[a.index], a.parity);
  negative_scores(first, own, s.tile[a.index]);
  stage.next();
  const Stage b = stage;
  cuda::mbarrier_wait(&s.full[b.index], b.parity);
  negative_scores(second, own, s.tile[b.index]);
  stage.next();
  uint32_t selected_first[8][4], selected_second[8][4];
  cuda::wgmma_wait<1>();
  cuda::wgmma_settle(first);
  select(first, a, 0, selected_first);
  add_selected(sums, selected_first, s.tile[a.index]);
  cuda::wgmma_wait<1>();
  cuda::wgmma_settle(second);
  select(second, b, 1, selected_second);
  add_selected(sums, selected_second, s.tile[b.index]);
  cuda::wgmma_wait<1>();
  cuda::mbarrier_arrive(&s.free[a.index]);
  cuda::wgmma_wait<0>();
  cuda::mbarrier_arrive(&s.free[b.index]);
  cuda::wgmma_settle(sums);
}

// Queries in pairs, those with the most keys (the last ones of a causal block) first. A pair with but two tiles takes
// both twice, the second time with what dI's rounding has left: of few keys a single rounding shows in the sums.
struct Pair {
  int first_query, begin, tiles;  // keys from `begin` on; an even number of tiles
  int steps;                      // in which tiles pass
  Range range[2];

  __device__ __forceinline__ Pair(const Arguments& a, int item) {
    first_query = ((a.queries + 1) / 2 - 1 - item) * 2;
    int from = a.keys, to = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      range[i] = a.range(first_query + i);
      if (range[i].begin < range[i].end) from = min(from, range[i].begin), to = max(to, range[i].end);
    }
    begin = from / kTile * kTile;
    tiles = from < to ? (to - begin + 2 * kTile - 1) / (2 * kTile) * 2 : 0;
    steps = tiles == 2 ? 4 : tiles;
  }
  __device__ __forceinline__ int key(int step) const { return begin + (tiles == 2 ? step % 2 : step) * kTile; }
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
    for (int i = 0; i < pair.steps; ++i, stage.next()) {
      const int key = pair.key(i);
      uint64_t* full = &s.full[stage.index];
      cuda::mbarrier_wait(&s.free[stage.index], stage.parity ^ 1);
      cuda::mbarrier_arrive_expect(full, kTileBytes + sizeof s.d[0]);
      for (int p = 0; p < 2; ++p) cuda::tma_load_2d(s.tile[stage.index] + p * kPanelBytes, &maps.k, full, p * 64, key);
      for (int p = 0; p < 4; ++p)
        cuda::tma_load_2d(s.d[stage.index] + p * 256, &maps.d, full, key + p * 32, pair.first_query);
    }
  }
}

// A warp: dI of one query to bf16, 0 outside its range. dI of the loss sums to 0, so that what the keys have in common
// leaves nothing but roundings: every rounding gives back what those of its lane before it have left, as far as a
// sixteenth to an eighth of a unit in the last place. (All of it at once would make independent roundings worse by a
// root of two.)
__device__ void round_tiles(const Arguments& a, Shared& s) {
  const int query = threadIdx.x / 32 % 4 - 1, lane = threadIdx.x % 32;
  Stage stage;
  for (int item = blockIdx.x; item < (a.queries + 1) / 2; item += gridDim.x) {
    const Pair pair(a, item);
    const Range range = query == 0 ? pair.range[0] : pair.range[1];
    float owed = 0;
    for (int i = 0; i < pair.steps; ++i, stage.next()) {
      const int key = pair.key(i) + 4 * lane;
      if (i == pair.tiles) owed = 0;
      cuda::mbarrier_wait(&s.full[stage.index], stage.parity);
      const uint32_t row = cuda::shared_address(s.d[stage.index]) + lane / 8 * 256 + query * 128;
      const uint32_t four = swizzled_row(row) ^ lane % 8 << 4;
      const float2 low = load_two(four), high = load_two(four + 8);
      const float given[4] = {low.x, low.y, high.x, high.y};
      float part[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = key + j >= range.begin && key + j < range.end ? given[j] : 0.f, most = fabsf(x) * 0x1p-11f;
        const float rounded = __bfloat162float(__float2bfloat16_rn(x + fminf(fmaxf(owed, -most), most)));
        owed += x - rounded;
        part[j] = i < pair.tiles ? rounded : x - rounded;
      }
      char* const lanes = s.rounded[stage.index][query] + lane % 2 * 2 * kLaneStride;
      auto* const to = reinterpret_cast<uint32_t*>(lanes) + lane / 2;
      to[0] = pack(part[0], part[1]);
      to[kLaneStride / 4] = pack(part[2], part[3]);
      cuda::mbarrier_arrive(&s.rounded_full[stage.index]);
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
    float sums[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] = 0;
    if (pair.tiles > 0) {
      cuda::mbarrier_wait(&s.own_full, own_parity);
      own_parity ^= 1;
    }
    for (int i = 0; i < pair.steps; i += 2)
      two_tiles(sums, own, s, stage, [&](const float(&score)[64], Stage at, int which, uint32_t(&selected)[8][4]) {
        const int key = pair.key(i + which);
        cuda::mbarrier_wait(&s.rounded_full[at.index], at.parity);
        uint32_t d[16];
#pragma unroll
        for (int b = 0; b < 16; b += 4) {
          const uint4 four =
              *reinterpret_cast<const uint4*>(s.rounded[at.index][group] + lane % 4 * kLaneStride + 4 * b);
          d[b] = four.x, d[b + 1] = four.y, d[b + 2] = four.z, d[b + 3] = four.w;
        }
        uint32_t bits[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < 32; ++j) {  // block j/2 of eight keys, row half j%2
          const uint32_t low = __float_as_uint(score[2 * j]), high = __float_as_uint(score[2 * j + 1]);
          selected[j / 4][j % 4] = d[j / 2] & signs(low, high);
          bits[j % 2] = __funnelshift_l(high, __funnelshift_l(low, bits[j % 2], 1), 1);
        }
        if (key < a.keys) {
          uint32_t* to = a.bits_of(pair.first_query / 2, key / kTile) + group * kQueryWords + lane % 4 * 8 + lane / 4;
#pragma unroll
          for (int h = 0; h < 2; ++h) to[(head / 8 + h) * 32] = bits[h];
        }
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
      cuda::mbarrier_arrive(&s.own_free);
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
      cuda::mbarrier_init(&s.free[i], kReaders);
      cuda::mbarrier_init(&s.rounded_full[i], 2 * 32);
    }
    cuda::mbarrier_init(&s.own_full, 1);
    cuda::mbarrier_init(&s.own_free, kReaders);
    cuda::mbarrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 2) {
    cuda::fewer_registers<40>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (threadIdx.x == 256) load_tiles(maps, a, s);
    else if (warp == 9 || warp == 10) round_tiles(a, s);
  } else {
    cuda::more_registers<232>();
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
