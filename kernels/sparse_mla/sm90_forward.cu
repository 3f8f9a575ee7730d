// Sparse attention in latent form on Hopper, forward; see params.h for the formula.
//
// A CTA attends with 64 heads of a query; the two halves of 128 heads run side by side, so that the second finds the
// gathered keys in L2. Two tiles of 64 keys are in shared memory. Warpgroup 0 scores the even tile, warpgroup 1 the odd
// one; warpgroup 0 owns output columns 0-255, warpgroup 1 columns 256-511, so each multiplies both P tiles with its half
// of the values. They work in antiphase: while one computes its softmax, the other keeps the tensor core busy. The
// running maximum passes from one to the other. P goes to the other warpgroup through the tile's rope panel, which is
// free once its scores are known. A third warpgroup gathers; each half tile is refilled as soon as its owner is done.
//
// Letters: T query rows, S keys, H heads, K list entries.
#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/sparse_mla/sm90_maps.h"
#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {
namespace {

constexpr float kNoMaximum = -1e30f;  // finite: differences of it are no NaN
constexpr int kThreads = 384;

struct Shared {
  alignas(1024) char q[kPanels * kPanelBytes];
  alignas(1024) char kv[2][kPanels * kPanelBytes];
  float maximum[2][64], sum[2][64];
  uint2 mask[2];
  uint64_t full[2][2], free[2][2];  // [tile][left panels 0-3, right panels 4-7]; panel 8 belongs to [0][1] and [1][0]
  uint64_t q_full, q_free;
};

struct Arguments {
  Lists lists;
  int64_t queries;
  int heads, halves;
  const char* kv;
  int64_t kv_bytes;
  float scale_log2;
  __nv_bfloat16* o;  // [T,H,512]
  float* lse;        // [T,H]
  uint32_t* bad_entries;
};

enum Named { kMaximum0 = 1, kMaximum1, kWeights0, kWeights1, kSums };

__device__ __forceinline__ int pairs_of(int length) { return (length + 2 * kTile - 1) / (2 * kTile); }

__device__ void gather_tiles(const CUtensorMap* map_q, const Arguments& a, Shared& s) {
  const int thread = threadIdx.x - 256;
  uint32_t pair_parity = 0, q_parity = 0;
  for (int64_t item = blockIdx.x; item < a.queries * a.halves; item += gridDim.x) {
    const int64_t t = item / a.halves;
    const int half = static_cast<int>(item % a.halves), length = a.lists.length(t), pairs = pairs_of(length);
    if (pairs == 0) continue;
    const int32_t* row = a.lists.indices + t * a.lists.stride;
    if (thread == 0) {
      cuda::mbarrier_wait(&s.q_free, q_parity ^ 1);
      cuda::mbarrier_arrive_expect(&s.q_full, kPanels * kPanelBytes);
      for (int p = 0; p < kPanels; ++p)
        cuda::tma_load_3d(s.q + p * kPanelBytes, map_q, &s.q_full, p * 64, half * kHeadBlock, static_cast<int>(t));
    }
    q_parity ^= 1;
    int good = 0;
    Entries next;
    next.load(row, 0, length, thread);
    for (int pair = 0; pair < pairs; ++pair) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int first = (2 * pair + tile) * kTile, early = tile;  // the part that its own warpgroup scores first
        Gather gather;
        gather.start(a.lists, next, a.kv, a.kv_bytes, thread);
        uint2 mask{0, 0};
        if (thread < 32) mask = next.mask(a.lists);
        next.load(row, first + kTile, length, thread);
        good += __popc(mask.x) + __popc(mask.y);
        const uint32_t to = cuda::shared_address(s.kv[tile]);
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int part = step ^ early;
          cuda::mbarrier_wait(&s.free[tile][part], pair_parity ^ 1);
#pragma unroll
          for (int p = 0; p < 4; ++p) gather.copy_panel(to, part * 4 + p);
          if (part != tile) gather.copy_panel(to, kPanels - 1);
          if (step == 0 && thread == 0) s.mask[tile] = mask;
          cuda::mbarrier_arrive_after_copies(&s.full[tile][part]);
          if (step == 0 && thread == 0) cuda::mbarrier_arrive(&s.full[tile][part]);
        }
      }
      pair_parity ^= 1;
    }
    if (thread == 0 && half == 0 && a.bad_entries && good < length) atomicAdd(a.bad_entries, length - good);
  }
}

// One k step (16 columns) of q against a panel's keys.
__device__ __forceinline__ void score_panel(float (&d)[32], const char* q, const char* kv, int panel, bool first) {
  const uint64_t a = cuda::operand_along_k(q + panel * kPanelBytes), b = cuda::operand_along_k(kv + panel * kPanelBytes);
#pragma unroll
  for (int i = 0; i < 4; ++i) cuda::wgmma_bf16_n64<false, false>(d, a + 2 * i, b + 2 * i, !(first && i == 0));
}

struct Softmax {
  float maximum[2], sum[2];  // of rows l/4 and l/4 + 8; sums of this lane's columns
};

// Scores times scale_log2, -inf where an entry does not count; returns the rows' greatest.
__device__ __forceinline__ void mask_and_maximum(float (&d)[32], uint2 mask, float scale, float (&greatest)[2]) {
  if ((mask.x & mask.y) != ~0u) {
    const int column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (!counts(mask, 8 * (i / 4) + column + i % 2)) d[i] = -INFINITY;
  }
  greatest[0] = d[0], greatest[1] = d[2];
#pragma unroll
  for (int i = 0; i < 32; ++i) greatest[i % 4 / 2] = fmaxf(greatest[i % 4 / 2], d[i]);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    greatest[h] = fmaxf(greatest[h], __shfl_xor_sync(~0u, greatest[h], 1));
    greatest[h] = fmaxf(greatest[h], __shfl_xor_sync(~0u, greatest[h], 2)) * scale;
  }
}

// d becomes exp2(d * scale - maximum), packed beside into operand fragments; returns row sums.
__device__ __forceinline__ void exponentiate(float (&d)[32], float scale, const float (&maximum)[2], float (&sum)[2]) {
  sum[0] = sum[1] = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int h = i % 4 / 2;
    d[i] = exp2_fast(fmaf(d[i], scale, -maximum[h]));
    sum[h] += d[i];
  }
}

__device__ __forceinline__ void to_fragments(const float (&d)[32], uint32_t (&f)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) f[i / 4][i % 4] = pack(d[2 * i], d[2 * i + 1]);
}

__device__ __forceinline__ void store_weights(char* tile, const float (&d)[32], const float (&by)[2]) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 16; ++i)
    store_pair(tile, row + 8 * (i % 2), 8 * (i / 2) + column, pack(d[2 * i] * by[i % 2], d[2 * i + 1] * by[i % 2]));
}

__device__ __forceinline__ void scale_output(float (&o)[128], const float (&by)[2]) {
  if (__all_sync(~0u, by[0] == 1 && by[1] == 1)) return;  // no new maximum, the usual case after a few tiles
#pragma unroll
  for (int i = 0; i < 128; ++i) o[i] *= by[i % 4 / 2];
}

// o += P V, V: four panels of 64 keys x 64 columns.
__device__ __forceinline__ void add_values(float (&o)[128], const uint32_t (&weights)[4][4], const char* values) {
  const uint64_t b = cuda::operand_across_k(values, kPanelBytes);
#pragma unroll
  for (int i = 0; i < 4; ++i) cuda::wgmma_bf16_n256<true>(o, weights[i], b + 128 * i);
}
__device__ __forceinline__ void add_values(float (&o)[128], const char* weights, const char* values) {
  const uint64_t a = cuda::operand_along_k(weights), b = cuda::operand_across_k(values, kPanelBytes);
#pragma unroll
  for (int i = 0; i < 4; ++i) cuda::wgmma_bf16_n256<false, true>(o, a + 2 * i, b + 128 * i);
}

template <int kGroup>
__device__ void attend(const Arguments& a, Shared& s) {
  const int lane = threadIdx.x % 32, head_row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  char* const own = s.kv[kGroup];
  char* const own_weights = own + 8 * kPanelBytes;
  char* const other_weights = s.kv[1 - kGroup] + 8 * kPanelBytes;
  uint32_t parity = 0, q_parity = 0;
  for (int64_t item = blockIdx.x; item < a.queries * a.halves; item += gridDim.x) {
    const int64_t t = item / a.halves;
    const int head = static_cast<int>(item % a.halves) * kHeadBlock + head_row;
    const int pairs = pairs_of(a.lists.length(t));
    const bool has[2] = {head < a.heads, head + 8 < a.heads};
    Softmax x{{kNoMaximum, kNoMaximum}, {0, 0}};
    float o[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i] = 0;
    if (pairs > 0) {
      cuda::mbarrier_wait(&s.q_full, q_parity);
      q_parity ^= 1;
    }
    float d[32];
    const auto score = [&] {  // the next own tile; begins the tensor work
      cuda::mbarrier_wait(&s.full[kGroup][kGroup], parity);
      cuda::fence_async_proxy();
      cuda::wgmma_fence();
#pragma unroll
      for (int p = 0; p < 4; ++p) score_panel(d, s.q, own, kGroup * 4 + p, p == 0);
      cuda::mbarrier_wait(&s.full[kGroup][1 - kGroup], parity);
      cuda::fence_async_proxy();
#pragma unroll
      for (int p = 0; p < 4; ++p) score_panel(d, s.q, own, (1 - kGroup) * 4 + p, false);
      score_panel(d, s.q, own, 8, false);
      cuda::wgmma_commit();
      parity ^= 1;
    };
    if (kGroup == 0 && pairs > 0) {
      score();
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(d);
    }
    for (int pair = 0; pair < pairs; ++pair) {
      if constexpr (kGroup == 1) {
        score();
        cuda::wgmma_wait<0>();
        cuda::wgmma_settle(d);
      }
      if (pair + 1 == pairs) arrive_once_a_warp(&s.q_free);
      float greatest[2], sum[2], by[2], after[2];
      mask_and_maximum(d, s.mask[kGroup], a.scale_log2, greatest);
      uint32_t weights[4][4];
      if constexpr (kGroup == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float m = fmaxf(x.maximum[h], greatest[h]);
          by[h] = exp2_fast(x.maximum[h] - m);
          x.maximum[h] = m;
          if (lane % 4 == 0) s.maximum[0][head_row + 8 * h] = m;
        }
        cuda::barrier_arrive<kMaximum0, 256>();
        exponentiate(d, a.scale_log2, x.maximum, sum);
        to_fragments(d, weights);
        scale_output(o, by);
        cuda::wgmma_fence();
        add_values(o, weights, own);
        cuda::wgmma_commit();
        cuda::barrier_sync<kMaximum1, 256>();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float m = s.maximum[1][head_row + 8 * h];
          after[h] = exp2_fast(x.maximum[h] - m);
          x.maximum[h] = m;
          x.sum[h] = (x.sum[h] * by[h] + sum[h]) * after[h];
        }
        store_weights(own_weights, d, after);
        cuda::fence_async_proxy();
        cuda::barrier_arrive<kWeights0, 256>();
        cuda::wgmma_wait<0>();
        cuda::wgmma_settle(o);
        arrive_once_a_warp(&s.free[0][0]);
        scale_output(o, after);
        cuda::barrier_sync<kWeights1, 256>();
        cuda::wgmma_fence();
        add_values(o, other_weights, s.kv[1]);
        cuda::wgmma_commit();
        if (pair + 1 < pairs) {  // the next scores wait in the tensor core's queue
          score();
          cuda::wgmma_wait<1>();
          arrive_once_a_warp(&s.free[1][0]);
          cuda::wgmma_wait<0>();
        } else {
          cuda::wgmma_wait<0>();
          arrive_once_a_warp(&s.free[1][0]);
        }
        cuda::wgmma_settle(o);
        cuda::wgmma_settle(d);
      } else {
        cuda::barrier_sync<kMaximum0, 256>();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float m = fmaxf(s.maximum[0][head_row + 8 * h], greatest[h]);
          by[h] = exp2_fast(x.maximum[h] - m);
          x.maximum[h] = m;
          if (lane % 4 == 0) s.maximum[1][head_row + 8 * h] = m;
        }
        cuda::barrier_arrive<kMaximum1, 256>();
        exponentiate(d, a.scale_log2, x.maximum, sum);
        const float one[2] = {1, 1};
        store_weights(own_weights, d, one);
        cuda::fence_async_proxy();
        cuda::barrier_arrive<kWeights1, 256>();
        to_fragments(d, weights);
#pragma unroll
        for (int h = 0; h < 2; ++h) x.sum[h] = x.sum[h] * by[h] + sum[h];
        scale_output(o, by);
        cuda::barrier_sync<kWeights0, 256>();
        cuda::wgmma_fence();
        add_values(o, other_weights, s.kv[0] + 4 * kPanelBytes);  // the even tile first: its refill is needed first
        cuda::wgmma_commit();
        add_values(o, weights, own + 4 * kPanelBytes);
        cuda::wgmma_commit();
        cuda::wgmma_wait<1>();
        arrive_once_a_warp(&s.free[0][1]);
        cuda::wgmma_wait<0>();
        cuda::wgmma_settle(o);
        arrive_once_a_warp(&s.free[1][1]);
      }
    }
    float inverse[2] = {0, 0}, total[2] = {0, 0};
    if (pairs > 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        x.sum[h] += __shfl_xor_sync(~0u, x.sum[h], 1);
        x.sum[h] += __shfl_xor_sync(~0u, x.sum[h], 2);
        if (lane % 4 == 0) s.sum[kGroup][head_row + 8 * h] = x.sum[h];
      }
      cuda::barrier_sync<kSums, 256>();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        total[h] = s.sum[0][head_row + 8 * h] + s.sum[1][head_row + 8 * h];
        inverse[h] = total[h] == 0 ? 0 : 1 / total[h];
      }
    }
    if (kGroup == 0 && lane % 4 == 0)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (has[h])
          a.lse[t * a.heads + head + 8 * h] = total[h] == 0 ? -INFINITY : (x.maximum[h] + log2f(total[h])) * 0.6931471805599453f;
    __nv_bfloat16* row = a.o + (t * a.heads + head) * int64_t{kLatent} + kGroup * 256;
    store_rows(o, row, row + 8 * kLatent, has[0], has[1], inverse[0], inverse[1]);
  }
}

__global__ void __launch_bounds__(kThreads, 1) forward(const __grid_constant__ CUtensorMap map_q, const Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    cuda::tma_prefetch_map(&map_q);
    for (int tile = 0; tile < 2; ++tile)
      for (int part = 0; part < 2; ++part) {
        cuda::mbarrier_init(&s.full[tile][part], part == tile ? 129 : 128);
        cuda::mbarrier_init(&s.free[tile][part], 4);
      }
    cuda::mbarrier_init(&s.q_full, 1);
    cuda::mbarrier_init(&s.q_free, 8);
    cuda::mbarrier_init_fence();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 2) {
    cuda::fewer_registers<72>();
    gather_tiles(&map_q, a, s);
  } else {
    cuda::more_registers<216>();
    if (group == 0) attend<0>(a, s);
    else attend<1>(a, s);
  }
}

}  // namespace

void require_supported(const SparseMlaParams& p, const char* what) {
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot run ") + what + " for Hopper (" + why + ") choose another implementation");
}

}  // namespace dsa::sparse_mla_sm90

namespace dsa {

bool sm90_supports(const SparseMlaParams& p, const char** why_not) {
  const auto no = [&](const char* why) { return *why_not = why, false; };
  if (!cuda::is_hopper()) return no("the current device is not of compute capability 9.0");
  if (p.heads < 1 || p.heads > 128) return no("the number of heads is not in 1 to 128");
  if (p.k < 64 || p.k > 4096 || p.k % 64) return no("the lists' width is not a multiple of 64 up to 4096");
  if (p.queries < 0 || p.keys < 0 || p.keys > int64_t{1} << 30 || p.queries > int64_t{1} << 30)
    return no("more than 2^30 queries or keys");
  if (p.q_stride % 8 || p.kv_stride % 8) return no("a stride of q or kv is not a multiple of 16 bytes");
  if (reinterpret_cast<uintptr_t>(p.q) % 16 || reinterpret_cast<uintptr_t>(p.kv) % 16) return no("q or kv is not 16-byte aligned");
  return true;
}

void launch_sparse_mla_forward_sm90(const SparseMlaForwardParams& p) {
  using namespace sparse_mla_sm90;
  require_supported(p, "sparse_mla forward");
  if (reinterpret_cast<uintptr_t>(p.o) % 16)
    throw std::runtime_error("cannot run sparse_mla forward for Hopper (o is not 16-byte aligned) choose another implementation");
  if (p.queries == 0) return;
  const int halves = (p.heads + kHeadBlock - 1) / kHeadBlock;
  const Arguments a{{p.indices, p.indices_stride, p.lengths, p.k, static_cast<int>(p.keys)},
                    p.queries, p.heads, halves, static_cast<const char*>(p.kv), p.kv_stride * 2,
                    p.scale * 1.4426950408889634f, static_cast<__nv_bfloat16*>(p.o), p.lse, p.bad_entries};
  const CUtensorMap map_q = map_heads(p.q, p, p.q_stride, kDim);
  cuda::check(cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
              "reserve shared memory for sparse_mla forward");
  const int64_t items = p.queries * halves, most = cuda::multiprocessors();
  forward<<<static_cast<int>(items < most ? items : most), kThreads, sizeof(Shared), p.stream>>>(map_q, a);
  cuda::check(cudaGetLastError(), "launch sparse_mla forward");
}

}  // namespace dsa
