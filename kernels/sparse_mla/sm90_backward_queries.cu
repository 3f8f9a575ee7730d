// Backward of sparse attention in latent form on Hopper, the part that belongs to queries: P, dS, dq and p_sel.
//
// A CTA takes 64 heads of a query and walks the list in tiles of 64 keys. A warpgroup computes S^T and (dO V^T)^T of 32
// heads in one product, q and do lying beside each other, and turns both into P and dS where they are. The tiles of all
// 64 heads go to memory for the kernel that sums over queries; dS also meets the keys again: warpgroup 0 owns dq
// columns 0-287, warpgroup 1 columns 288-575, panel by panel, and a panel is refilled with the next tile's keys as soon
// as it is done. q, do and one tile fill the shared memory; the next tile's keys are fetched into the L2 cache ahead,
// which pays where they are in it anyway, too. Where queries have 32 heads or fewer, the 64 rows are those of 2, 4 or 8
// queries and the list is the union of theirs.
//
// Letters: T query rows, S keys, H heads, K list entries.
#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/sparse_mla/sm90_backward.h"
#include "kernels/sparse_mla/sm90_backward_instructions.cuh"
#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {
namespace {

constexpr int kThreads = 384;
constexpr int kHalfPanel = kPanelBytes / 2;  // 32 heads

struct Shared {
  // Of 64 columns each: q of heads 0-31, do of them, q and do of 32-63.
  alignas(1024) char qg[kValuePanels * 2 * kPanelBytes];
  alignas(1024) char q_rope[kPanelBytes];
  alignas(1024) char kv[kPanels * kPanelBytes];
  alignas(1024) char weights[kWeightBytes];  // P, dS: 64 keys x 64 heads
  float4 terms[2][4][4];  // of the heads 8b + 2q and the next: log-sum-exps, in powers of two, then scaled deltas
  float column_sums[2][kTile];
  uint2 mask;
  uint64_t full[kPanels], free[kPanels], q_full, q_free;
};

struct Arguments {
  Lists lists;
  int64_t first_list, first_row, end_row;
  int items, heads, blocks, group, shift;  // group: queries of a CTA, 2^shift rows each
  const uint16_t* places;           // of a union of lists, see sm90_backward.h
  int k;                            // entries of a query's own list
  const char* kv;
  int64_t kv_bytes;
  float scale, scale_log2, share;  // share: 1 / heads
  const float *lse, *delta;        // [T,H]
  char* weights;
  __nv_bfloat16* dq;               // [T,H,576]
  float* p_sel;                    // [T,K], zero before
};

// The query and head of a row of the CTA's 64.
struct Row {
  int64_t t;
  int head;
  bool has;
  template <bool kPacked>
  __device__ __forceinline__ static Row of(const Arguments& a, int64_t first, int block, int row) {
    if constexpr (kPacked) {
      const int64_t t = first + (row >> a.shift);
      const int head = row & ((1 << a.shift) - 1);
      return {t, head, head < a.heads && t < a.end_row};
    } else {
      const int head = block * kHeadBlock + row;
      return {first, head, head < a.heads};
    }
  }
};

enum Named { kWritten = 1, kTerms0, kTerms1 };

// The order in which panels become free, and are filled and read again.
__device__ constexpr int panel_at(int i) { return i == 8 ? 4 : i % 2 ? 5 + i / 2 : i / 2; }

template <bool kPacked>
__device__ void gather_tiles(const CUtensorMap* map_q, const CUtensorMap* map_g, const Arguments& a, Shared& s) {
  const int thread = threadIdx.x - 256;
  uint32_t parity = 0, item_parity = 0;
  Entries next;
  int next_length = 0;
  const auto load_first = [&](int item) {  // of an item
    const int64_t list = a.first_list + item / a.blocks;
    if (item < a.items) next.load(a.lists.indices + list * a.lists.stride, 0, next_length, thread);
  };
  const auto load_length = [&](int item) {
    next_length = item < a.items ? a.lists.length(a.first_list + item / a.blocks) : 0;
  };
  load_length(blockIdx.x), load_first(blockIdx.x);
  for (int item = blockIdx.x; item < a.items; item += gridDim.x) {
    const int64_t list = a.first_list + item / a.blocks, t = a.first_row + item / a.blocks * int64_t{a.group};
    const int head = item % a.blocks * kHeadBlock, length = next_length, tiles = tiles_of(length),
              after = item + gridDim.x;
    load_length(after);
    if (tiles == 0) {
      load_first(after);
      continue;
    }
    const int32_t* row = a.lists.indices + list * a.lists.stride;
    if (thread == 0) {
      cuda::mbarrier_wait(&s.q_free, item_parity ^ 1);
      cuda::mbarrier_arrive_expect(&s.q_full, (kPanels + kValuePanels) * kPanelBytes);
      for (int i = 0; i < kPanels; ++i)
        for (int b = 0; b < 2; ++b) {
          const int p = panel_at(i);
          char* const to = p == 8 ? s.q_rope + b * kHalfPanel : s.qg + (4 * p + 2 * b) * kHalfPanel;
          const int from_head = kPacked ? 0 : head + 32 * b,
                    from_query = static_cast<int>(t) + (kPacked ? b * (32 >> a.shift) : 0);
          cuda::tma_load_3d(to, map_q, &s.q_full, p * 64, from_head, from_query);
          if (p < 8) cuda::tma_load_3d(to + kHalfPanel, map_g, &s.q_full, p * 64, from_head, from_query);
        }
    }
    item_parity ^= 1;
    for (int tile = 0; tile < tiles; ++tile, parity ^= 1) {
      Gather gather;
      gather.start(a.lists, next, a.kv, a.kv_bytes, thread);
      uint2 mask{0, 0};
      if (!kPacked && thread < 32) mask = next.mask(a.lists);
      if (tile + 1 < tiles) next.load(row, (tile + 1) * kTile, length, thread);
      else load_first(after);
      const uint32_t to = cuda::shared_address(s.kv);
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        const int p = panel_at(i);
        cuda::mbarrier_wait(&s.free[p], parity ^ 1);
        gather.copy_panel(to, p);
        if (p == 4 && thread == 0) s.mask = mask;  // free for both warpgroups, which read the tile before's
        cuda::mbarrier_arrive_after_copies(&s.full[p]);
        if (p == 4 && thread == 0) cuda::mbarrier_arrive(&s.full[p]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (thread % 8 == j && next.key[j] >= 0 && next.key[j] < a.lists.keys)
          cuda::prefetch_l2<kDim * 2>(a.kv + next.key[j] * a.kv_bytes);
    }
  }
}

template <bool kPacked>
__device__ void differentiate(const Arguments& a, Shared& s) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % 128;
  const int first_panel = group * 5;
  const uint64_t once = cuda::evict_first();
  const uint32_t weights = cuda::shared_address(s.weights);
  // stmatrix: lane's row of the 8 x 8 pieces, heads 8(lane/8) of the warpgroup's 32; the row of keys + 8 lies 1024
  // further.
  const uint32_t piece_to = weights + (warp * 16 + lane % 8) * 128 + (((group * 4 + lane / 8) ^ (lane % 8)) << 4);
  // ldmatrix: keys lane%8 (+ 8 for lanes 16-31) of 16, heads 16 warp (+ 8 for odd eights of lanes).
  const uint32_t piece_from =
      weights + kPanelBytes + (lane % 8 + (lane >> 4) * 8) * 128 + (((warp * 2 + (lane >> 3 & 1)) ^ (lane % 8)) << 4);
  uint32_t parity = 0, item_parity = 0;
  for (int item = blockIdx.x; item < a.items; item += gridDim.x) {
    const int64_t index = item / a.blocks, list = a.first_list + index, t = a.first_row + index * a.group;
    const int block = static_cast<int>(item % a.blocks), tiles = tiles_of(a.lists.length(list));
    if (thread < 32) {
      const Row row = Row::of<kPacked>(a, t, block, group * 32 + thread);
      float* const terms = &s.terms[group][thread / 8][thread % 8 / 2].x + thread % 2;
      terms[0] = row.has ? __ldg(a.lse + row.t * a.heads + row.head) * 1.4426950408889634f : INFINITY;
      terms[2] = row.has ? __ldg(a.delta + row.t * a.heads + row.head) * a.scale : 0.f;
    }
    if (group == 0) cuda::barrier_sync<kTerms0, 128>();
    else cuda::barrier_sync<kTerms1, 128>();
    float dq[4][32], dq_last[16];
#pragma unroll
    for (int i = 0; i < 128; ++i) dq[i / 32][i % 32] = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) dq_last[i] = 0;
    if (tiles > 0) {
      cuda::mbarrier_wait(&s.q_full, item_parity);
      item_parity ^= 1;
    }
    // Of the query that this lane's eight heads belong to, if it is the lane that stores.
    float* const p_sel = a.p_sel + (t + ((group * 32 + lane % 4 * 8) >> a.shift)) * a.k;
    const bool stores = (lane % 4 & ((1 << (a.shift - 3)) - 1)) == 0;
    for (int tile = 0; tile < tiles; ++tile, parity ^= 1) {
      // Of this thread's keys in the list of the query that rows 8b and on belong to, two in a word.
      uint32_t places[2][2];
      if constexpr (kPacked) {
        const uint16_t* const from = a.places + (index * a.lists.k + tile * kTile + warp * 16 + lane / 4) * a.group;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto place = [&](int b) {
            return static_cast<uint32_t>(__ldg(from + i / 2 * 8 * a.group + ((group * 32 + b * 8) >> a.shift)));
          };
          places[i / 2][i % 2] = place(i % 2 * 2) | place(i % 2 * 2 + 1) << 16;
        }
      }
      float d[32];  // rows: keys; columns: S of the warpgroup's 32 heads, dO V of them
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        const int p = panel_at(i);
        cuda::mbarrier_wait(&s.full[p], parity);
        cuda::fence_async_proxy();
        if (i == 0) cuda::wgmma_fence();
        const uint64_t x = cuda::operand_along_k(s.kv + p * kPanelBytes);
        const uint64_t y =
            cuda::operand_along_k(p == 8 ? s.q_rope + group * kHalfPanel : s.qg + (2 * p + group) * kPanelBytes);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (p == 8) cuda::wgmma_bf16_n32_of_64<false, false>(d, x + 2 * j, y + 2 * j);
          else cuda::wgmma_bf16_n64<false, false>(d, x + 2 * j, y + 2 * j, i + j > 0);
        }
      }
      cuda::wgmma_commit();
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(d);
      if (tile + 1 == tiles) cuda::mbarrier_arrive(&s.q_free);

      const uint32_t bits = (warp < 2 ? s.mask.x : s.mask.y) >> (warp % 2 * 16 + lane / 4);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto place = [&](int b) { return places[h][b / 2] >> (b % 2 * 16) & kNowhere; };
        float sums[4];  // over the heads 8b + 2(lane%4) + e
        uint32_t p[4], ds[4];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const float4 terms = s.terms[group][b][lane % 4];
          const bool has = kPacked ? place(b) != kNowhere : bits >> (8 * h) & 1;
          float weight[2], slope[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int i = 4 * b + 2 * h + e;
            weight[e] = has ? exp2_approx(fmaf(d[i], a.scale_log2, e ? -terms.y : -terms.x)) : 0.f;
            slope[e] = weight[e] * fmaf(d[16 + i], a.scale, e ? -terms.w : -terms.z);
          }
          sums[b] = weight[0] + weight[1];
          p[b] = pack(weight[0], weight[1]);
          ds[b] = pack(slope[0], slope[1]);
        }
        cuda::store_matrices(piece_to + h * 1024, p[0], p[1], p[2], p[3]);
        cuda::store_matrices(piece_to + kPanelBytes + h * 1024, ds[0], ds[1], ds[2], ds[3]);
        if constexpr (kPacked) {
          // Lane q of a quad is left with the sum over its eight heads 8q and on, then over those of their query.
          const bool upper = lane & 2, odd = lane & 1;
          const float x = (upper ? sums[2] : sums[0]) + __shfl_xor_sync(~0u, upper ? sums[0] : sums[2], 2);
          const float y = (upper ? sums[3] : sums[1]) + __shfl_xor_sync(~0u, upper ? sums[1] : sums[3], 2);
          float sum = (odd ? y : x) + __shfl_xor_sync(~0u, odd ? x : y, 1);
          if (a.shift > 3) sum += __shfl_xor_sync(~0u, sum, 1);
          if (a.shift > 4) sum += __shfl_xor_sync(~0u, sum, 2);
          const uint32_t at = (upper ? places[h][1] : places[h][0]) >> (odd ? 16 : 0) & kNowhere;
          if (stores && at != kNowhere) p_sel[at] = sum * a.share;
        } else {
          float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
          if (lane % 4 == 0) s.column_sums[group][warp * 16 + 8 * h + lane / 4] = sum;
        }
      }
      cuda::fence_async_proxy();
      cuda::barrier_sync<kWritten, 256>();
      if (group == 0 && thread == 0)
        cuda::bulk_store_once(a.weights + ((index * (a.lists.k / kTile) + tile) * a.blocks + block) * kWeightBytes,
                              s.weights, kWeightBytes, once);
      uint32_t x[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) cuda::load_matrices_transposed(x[j], piece_from + j * 2048);
      cuda::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t y = cuda::operand_across_k(s.kv + (first_panel + i) * kPanelBytes);
#pragma unroll
        for (int j = 0; j < 4; ++j) cuda::wgmma_bf16_n64<true>(dq[i], x[j], y + 128 * j);
        cuda::wgmma_commit();
        if (i == 0) continue;
        // Here and not behind the last product: a warp is held up where it issues products faster than they run.
        cuda::wgmma_wait<1>();
        cuda::mbarrier_arrive(&s.free[first_panel + i - 1]);
      }
      const uint64_t y = cuda::operand_across_k(s.kv + 4 * kPanelBytes) + 4 * group;
#pragma unroll
      for (int j = 0; j < 4; ++j) cuda::wgmma_bf16_n32<true>(dq_last, x[j], y + 128 * j);
      cuda::wgmma_commit();
      if (!kPacked && group == 1 && thread < kTile)
        atomicAdd(a.p_sel + t * a.lists.k + tile * kTile + thread,  // two blocks at most: order is no matter
                  (s.column_sums[0][thread] + s.column_sums[1][thread]) * a.share);
      cuda::wgmma_wait<1>();
      if (group == 0 && thread == 0)
        cuda::bulk_store_wait_read();  // nobody writes to the tiles before this panel is full again
      cuda::mbarrier_arrive(&s.free[first_panel + 3]);
      cuda::wgmma_wait<0>();
      cuda::mbarrier_arrive(&s.free[4]);
#pragma unroll
      for (int i = 0; i < 4; ++i) cuda::wgmma_settle(dq[i]);
      cuda::wgmma_settle(dq_last);
    }
    const Row upper = Row::of<kPacked>(a, t, block, warp * 16 + lane / 4),
              lower = Row::of<kPacked>(a, t, block, warp * 16 + lane / 4 + 8);
    __nv_bfloat16* const to = a.dq + (upper.t * a.heads + upper.head) * kDim;
    __nv_bfloat16* const to8 = a.dq + (lower.t * a.heads + lower.head) * kDim;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store_rows(dq[i], to + (first_panel + i) * 64, to8 + (first_panel + i) * 64, upper.has, lower.has, 1, 1);
    store_rows(dq_last, to + 256 + group * 32, to8 + 256 + group * 32, upper.has, lower.has, 1, 1);
  }
  if (group == 0 && thread == 0) cuda::bulk_store_wait();
}

template <bool kPacked>
__global__ void __launch_bounds__(kThreads, 1)
    backward_queries(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_g,
                     const Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    cuda::tma_prefetch_map(&map_q);
    cuda::tma_prefetch_map(&map_g);
    for (int p = 0; p < kPanels; ++p) {
      cuda::mbarrier_init(&s.full[p], p == 4 ? 129 : 128);
      cuda::mbarrier_init(&s.free[p], p == 4 ? 256 : 128);
    }
    cuda::mbarrier_init(&s.q_full, 1);
    cuda::mbarrier_init(&s.q_free, 256);
    cuda::mbarrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 2) {
    cuda::fewer_registers<kPacked ? 56 : 72>();
    gather_tiles<kPacked>(&map_q, &map_g, a, s);
  } else {
    cuda::more_registers<kPacked ? 224 : 216>();
    differentiate<kPacked>(a, s);
  }
}

template <bool kPacked>
void launch(const CUtensorMap& map_q, const CUtensorMap& map_g, const Arguments& a, int multiprocessors,
            cudaStream_t stream) {
  cuda::check(
      cudaFuncSetAttribute(backward_queries<kPacked>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
      "reserve shared memory for sparse_mla backward");
  backward_queries<kPacked>
      <<<std::min(a.items, multiprocessors), kThreads, sizeof(Shared), stream>>>(map_q, map_g, a);
  cuda::check(cudaGetLastError(), "launch sparse_mla backward");
}

}  // namespace

void launch_queries(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g,
                    const Chunk& chunk, cudaStream_t stream) {
  const int group = chunk.lists.group, blocks = (p.heads + kHeadBlock - 1) / kHeadBlock;
  const Arguments a{lists_of(p, chunk),
              first_list(chunk),
              chunk.first_row,
              chunk.first_row + chunk.rows,
              static_cast<int>(groups_of(chunk)) * blocks,
              p.heads,
              blocks,
              group,
              row_shift(p.heads),
              chunk.lists.places,
              p.k,
              static_cast<const char*>(p.kv),
              p.kv_stride * 2,
              p.scale,
              p.scale * 1.4426950408889634f,
              1.f / p.heads,
              p.lse,
              p.delta,
              chunk.weights,
              static_cast<__nv_bfloat16*>(p.dq),
              p.p_sel};
  (group > 1 ? launch<true> : launch<false>)(map_q, map_g, a, chunk.multiprocessors, stream);
}

}  // namespace dsa::sparse_mla_sm90
