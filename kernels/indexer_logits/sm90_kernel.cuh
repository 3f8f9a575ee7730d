// The lightning indexer's scores on Hopper's tensor cores; see params.h for the formula.
//
// A wgmma multiplies 64 keys (M) by 128 (query, head) pairs (N); the sum over heads then stays inside the four lanes
// that share a key's row. A unit of work is a tile of kTileKeys keys by a block of kQueries query rows; the tiles of
// all blocks, in order, are cut into equal spans, one for each multiprocessor. One warp copies the queries, weights and
// ranges of the next block beside those in use, another keeps a ring of key tiles full. Each math warpgroup owns 64 keys
// of a tile and walks the block's queries in two steps of 128 pairs, each with its own accumulators: while the tensor
// core fills one, the warps reduce the other. Weights stay in registers; the register file is what binds (operands of
// the reduction wait for the tensor core's accumulators), so the reduction is kept to two instructions an element.
//
// Letters: T query rows, S keys, J heads (padded to kHeads by zero weights), D dim (padded to 128 by the copy engine).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/mbarrier.cuh"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/indexer_logits/params.h"

namespace dsa::indexer_logits_sm90 {

struct Arguments {
  int64_t queries;
  int keys, heads;
  const float* w;  // [T,J]
  int64_t w_stride;
  const float* k_scale;      // [S] or null
  const int32_t *start, *end;  // [T] or null
  float* logits;             // [T,S]
  int64_t logits_stride;
  int least_keys;            // rows with fewer are left to launch_short_e4m3
};

template <bool kFp8_, int kHeads_>
struct Config {
  static constexpr bool kFp8 = kFp8_;
  static constexpr int kHeads = kHeads_;                 // 8, 16, 32 or 64
    static constexpr int kGroups = 2;                      // math warpgroups
  static constexpr int kTileKeys = 64 * kGroups;
  static constexpr int kSteps = 2;                       // wgmma columns of a block / 128
  static constexpr int kStepQueries = 128 / kHeads;
  static constexpr int kQueries = kSteps * kStepQueries;
  static constexpr int kPanels = kFp8 ? 1 : 2;           // 128-byte panels of a 128-element row
  static constexpr int kPanelElements = 128 / kPanels;
  static constexpr int kStepBytes = 128 * 128 * kPanels;
  static constexpr int kQueryBytes = kSteps * kStepBytes;
  static constexpr int kStageBytes = kTileKeys * 128 * kPanels;
  static constexpr int kExtraBytes = 2 * (kSteps * 512 + kQueries * 8 + 64) + 256;
  static constexpr int kFit = (227 * 1024 - 2 * kQueryBytes - kExtraBytes) / kStageBytes;
  static constexpr int kStages = kFit > 6 ? 6 : kFit;
  static constexpr int kThreads = 128 * (kGroups + 1);
};

struct Range {
  int begin, end;
};

// What the copying warp tells the others about a block, beside its queries.
template <class C>
struct Block {
  alignas(16) float weights[C::kSteps * 128];  // in the order in which a lane reads them, see weight_place
  Range range[C::kQueries];
  int64_t first_query;
  int first_key, tiles;            // this multiprocessor's share; no tiles: the end
  Range common;                    // the keys that every row wants
};

template <class C>
struct Shared {
  alignas(1024) char q[2][C::kQueryBytes];
  alignas(1024) char k[C::kStages][C::kStageBytes];
  Block<C> block[2];
  uint64_t described[2], q_full[2], q_empty[2], k_full[C::kStages], k_empty[C::kStages];
  int64_t warp_sums[C::kThreads / 32];
  int64_t first_block, first_tile;
};

// Column c = 8b + 2q + e of a step, read by lane q (mod 4): the two column pairs of blocks 2i and 2i+1 side by side.
__device__ __forceinline__ int weight_place(int c) {
  const int b = c >> 3, q = (c >> 1) & 3, e = c & 1;
  return (b >> 1) * 16 + q * 4 + (b & 1) * 2 + e;
}

constexpr int kFewKeys = 1024;  // e4m3 rows with fewer keys are summed more exactly

__device__ __forceinline__ Range whole_range(const Arguments& a, int64_t t) {
  const int begin = a.start ? max(__ldg(a.start + t), 0) : 0;
  const int end = a.end ? min(__ldg(a.end + t), a.keys) : a.keys;
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// Empty where this kernel has nothing to do.
__device__ __forceinline__ Range row_range(const Arguments& a, int64_t t) {
  if (t >= a.queries) return {0, 0};
  const Range r = whole_range(a, t);
  return r.end - r.begin >= a.least_keys ? r : Range{0, 0};
}

// The keys that some row of a block wants, from a multiple of 8 on (whole 32-byte sectors of logits), and those that
// every row wants.
template <class C, int kAtOnce>
__device__ __forceinline__ Range block_range(const Arguments& a, int64_t block, Range* common = nullptr) {
  Range all{a.keys, 0}, every{0, a.keys};
#pragma unroll kAtOnce
  for (int i = 0; i < C::kQueries; ++i) {
    const Range r = row_range(a, block * C::kQueries + i);
    if (r.begin < r.end) all = {min(all.begin, r.begin), max(all.end, r.end)};
    every = {max(every.begin, r.begin), min(every.end, r.end)};
  }
  if (common) *common = every;
  return all.begin < all.end ? Range{all.begin & ~7, all.end} : Range{0, 0};
}

template <class C>
__device__ __forceinline__ int tiles_of(Range r) {
  return (r.end - r.begin + C::kTileKeys - 1) / C::kTileKeys;
}

// Where this multiprocessor's equal share of all tiles begins: a block, and tiles to skip in it. Returns its size.
template <class C>
__device__ int64_t find_share(const Arguments& a, int64_t blocks, Shared<C>& s) {
  const int64_t each = (blocks + C::kThreads - 1) / C::kThreads;
  const int64_t from = min(each * threadIdx.x, blocks), to = min(from + each, blocks);
  int64_t own = 0;
  for (int64_t b = from; b < to; ++b) own += tiles_of<C>(block_range<C, 8>(a, b));
  int64_t upto = own;  // inclusive prefix sum over the threads
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const int64_t other = __shfl_up_sync(~0u, upto, d);
    if (lane >= d) upto += other;
  }
  if (lane == 31) s.warp_sums[warp] = upto;
  __syncthreads();
  int64_t total = 0;
  for (int i = 0; i < C::kThreads / 32; ++i) {
    if (i < warp) upto += s.warp_sums[i];
    total += s.warp_sums[i];
  }
  const int64_t rest = total % gridDim.x;
  const int64_t first = total / gridDim.x * blockIdx.x + (blockIdx.x < rest ? blockIdx.x : rest);
  const int64_t count = total / gridDim.x + (blockIdx.x < rest);
  if (count > 0 && upto - own <= first && first < upto) {
    int64_t skip = first - (upto - own), b = from;
    for (;; ++b) {
      const int n = tiles_of<C>(block_range<C, 8>(a, b));
      if (skip < n) break;
      skip -= n;
    }
    s.first_block = b;
    s.first_tile = skip;
  }
  __syncthreads();
  return count;
}

// One warp walks the blocks of this multiprocessor's share, up to two ahead of the others: their queries, weights and
// ranges. A block without tiles ends the walk.
template <class C>
__device__ void copy_queries(const CUtensorMap* map_q, const Arguments& a, Shared<C>& s, int64_t left) {
  const int lane = threadIdx.x % 32;
  int64_t block = left > 0 ? s.first_block : 0, skip = left > 0 ? s.first_tile : 0;
  for (int use = 0;; ++block) {
    Range keys{0, 0}, common{0, 0};
    int tiles = 0;
    if (left > 0) {
      keys = block_range<C, 4>(a, block, &common);
      const int64_t in_block = tiles_of<C>(keys) - skip;
      tiles = static_cast<int>(in_block < left ? in_block : left);
      if (tiles == 0) continue;
    }
    const int buffer = use & 1;
    cuda::mbarrier_wait(&s.q_empty[buffer], (use >> 1 & 1) ^ 1);
    Block<C>& b = s.block[buffer];
    const int64_t t0 = block * C::kQueries;
    if (lane == 0) {
      b.first_query = t0;
      b.first_key = keys.begin + static_cast<int>(skip) * C::kTileKeys;
      b.tiles = tiles;
      b.common = common;
      cuda::mbarrier_arrive(&s.described[buffer]);
      if (tiles == 0) {
        cuda::mbarrier_arrive(&s.q_full[buffer]);
      } else {
        cuda::mbarrier_arrive_expect(&s.q_full[buffer], C::kQueryBytes);
        for (int i = 0; i < C::kSteps; ++i)
          for (int panel = 0; panel < C::kPanels; ++panel)
            cuda::tma_load_3d(s.q[buffer] + i * C::kStepBytes + panel * 128 * 128, map_q, &s.q_full[buffer],
                              panel * C::kPanelElements, 0, static_cast<int>(t0) + i * C::kStepQueries);
      }
    }
    if (tiles > 0) {
#pragma unroll 4
      for (int i = lane; i < C::kSteps * 128; i += 32) {
        const int64_t t = t0 + i / C::kHeads;
        const int j = i % C::kHeads;
        b.weights[(i & ~127) + weight_place(i & 127)] =
            t < a.queries && j < a.heads ? __ldg(a.w + t * a.w_stride + j) * (C::kFp8 ? 0x1p25f : 1.f) : 0.f;
      }
      for (int i = lane; i < C::kQueries; i += 32) b.range[i] = row_range(a, t0 + i);
    }
    cuda::mbarrier_arrive(&s.q_full[buffer]);
    if (tiles == 0) return;
    left -= tiles;
    skip = 0;
    ++use;
  }
}

// One thread of another warp keeps the ring of key tiles full.
template <class C>
__device__ void copy_keys(const CUtensorMap* map_k, Shared<C>& s) {
  int stage = 0, stage_phase = 0;
  for (int use = 0;; ++use) {
    const int buffer = use & 1;
    cuda::mbarrier_wait(&s.described[buffer], use >> 1 & 1);
    const int tiles = s.block[buffer].tiles, first_key = s.block[buffer].first_key;
    if (tiles == 0) return;
    cuda::mbarrier_arrive(&s.q_empty[buffer]);
    for (int i = 0; i < tiles; ++i) {
      cuda::mbarrier_wait(&s.k_empty[stage], stage_phase ^ 1);
      cuda::mbarrier_arrive_expect(&s.k_full[stage], C::kStageBytes);
      for (int panel = 0; panel < C::kPanels; ++panel)
        cuda::tma_load_2d(s.k[stage] + panel * C::kTileKeys * 128, map_k, &s.k_full[stage], panel * C::kPanelElements,
                          first_key + i * C::kTileKeys);
      if (++stage == C::kStages) stage = 0, stage_phase ^= 1;
    }
  }
}

template <class C>
__device__ __forceinline__ void multiply(float (&acc)[64], uint32_t keys, uint32_t queries) {
  cuda::wgmma_fence();
#pragma unroll
  for (int i = 0; i < C::kPanels * 4; ++i) {
    const uint32_t a = keys + i / 4 * (C::kTileKeys * 128 / 16) + i % 4 * 2;
    const uint32_t b = queries + i / 4 * (128 * 128 / 16) + i % 4 * 2;
    if constexpr (C::kFp8) i == 0 ? cuda::wgmma_e4m3_first(acc, a, b) : cuda::wgmma_e4m3(acc, a, b);
    else i == 0 ? cuda::wgmma_bf16_first(acc, a, b) : cuda::wgmma_bf16(acc, a, b);
  }
  cuda::wgmma_commit();
}

// relu(x) times 2^-25 for e4m3, whose dot products stay below 128 * 448^2 < 2^25: a saturating multiplication runs on
// the FMA pipe, a maximum on the slower ALU; both are exact. NaN becomes 0 in the first and stays NaN in the second.
template <class C>
__device__ __forceinline__ float relu(float x) {
  float y;
  if constexpr (C::kFp8) asm("mul.sat.f32 %0, %1, 0f33000000;" : "=f"(y) : "f"(x));
  else asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// One step's accumulators, weighted and summed over this lane's heads: [query][row half]. The same weight serves both
// rows one after the other: the operand is read from the register file once.
template <class C>
__device__ __forceinline__ void weigh(const float (&acc)[64], const float4 (&weights)[8], float (&sum)[2 * C::kStepQueries]) {
  constexpr int kBlocks = C::kHeads / 8;  // of eight columns a query
  float chain[2][2 * C::kStepQueries];    // even and odd columns apart: shorter chains
#pragma unroll
  for (int pair = 0; pair < 8; ++pair) {
    const float4 w4 = weights[pair];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int b = 2 * pair + half, query = b / kBlocks;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float w = half ? (e ? w4.w : w4.z) : (e ? w4.y : w4.x);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          float& x = chain[e][2 * query + row];
          const float y = relu<C>(acc[4 * b + 2 * row + e]);
          x = b % kBlocks == 0 ? y * w : fmaf(y, w, x);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * C::kStepQueries; ++i) sum[i] = chain[0][i] + chain[1][i];
}

// Sums over the four lanes of a quad. Lane q returns, in value[i], query 2i + q/2 of the step and its row r + 8(q%2).
template <class C>
__device__ __forceinline__ void sum_quad(const float (&sum)[2 * C::kStepQueries], float (&value)[C::kStepQueries / 2]) {
  float two[C::kStepQueries];  // [pair of queries][row half], of query 2i + q/2
  const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
#pragma unroll
  for (int i = 0; i < C::kStepQueries; ++i) {
    const int at = (i / 2) * 4 + i % 2;
    const float mine = high ? sum[at + 2] : sum[at], theirs = high ? sum[at] : sum[at + 2];
    two[i] = mine + __shfl_xor_sync(~0u, theirs, 2);
  }
#pragma unroll
  for (int i = 0; i < C::kStepQueries / 2; ++i) {
    const float mine = odd ? two[2 * i + 1] : two[2 * i], theirs = odd ? two[2 * i] : two[2 * i + 1];
    value[i] = mine + __shfl_xor_sync(~0u, theirs, 1);
  }
}

template <class C>
__device__ void score_blocks(const Arguments& a, Shared<C>& s) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int own_key = group * 64 + warp * 16 + lane / 4 + 8 * (lane & 1), own_query = (lane & 3) >> 1;
  const uint32_t k_full = cuda::keep(cuda::shared_address(s.k_full)), k_empty = k_full + sizeof s.k_full;
  const uint32_t keys = cuda::keep(cuda::wgmma_operand(s.k[0] + group * 64 * 128));
  const int64_t stride = cuda::keep(a.logits_stride);
  int stage = 0, stage_phase = 0;
  for (int use = 0;; ++use) {
    const int buffer = use & 1;
    cuda::mbarrier_wait(&s.q_full[buffer], use >> 1 & 1);
    const Block<C>& b = s.block[buffer];
    const int tiles = __shfl_sync(~0u, b.tiles, 0);
    if (tiles == 0) return;
    const uint32_t queries = cuda::keep(cuda::wgmma_operand(s.q[buffer]));
    const Range common = b.common;
    int key = b.first_key + own_key;
    float* out = a.logits + (b.first_query + own_query) * stride + key;
    const auto load_scale = [&](int of_key) { return a.k_scale ? __ldg(a.k_scale + min(of_key, a.keys - 1)) : 1.f; };
    float scale = 1.f, next_scale = load_scale(key);
    float4 weights[C::kSteps][8];
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        weights[step][i] = reinterpret_cast<const float4*>(b.weights + step * 128)[i * 4 + (lane & 3)];

    // Values of a step and of the tile `back` before the current one.
    const auto store = [&](int step, int back, const float(&value)[C::kStepQueries / 2], float scale, bool inside) {
#pragma unroll
      for (int j = 0; j < C::kStepQueries / 2; ++j) {
        const int query = step * C::kStepQueries + 2 * j, this_key = key - back * C::kTileKeys;
        bool wanted = inside;
        if (!inside) {
          const Range r = b.range[query + own_query];
          wanted = this_key >= r.begin && this_key < r.end;
        }
        if (wanted) __stcs(out + query * stride - back * C::kTileKeys, value[j] * scale);
      }
    };
    // While the tensor core works on one step, the other is weighed; the sums of a tile's second step leave while the
    // next tile is multiplied. No accumulator is in flight from one tile to the next: the compiler would serialise
    // everything. The order of these statements was measured; others cost up to 15 %.
    float first[64], second[64], sum[2 * C::kStepQueries] = {}, value[C::kStepQueries / 2];
    bool inside = false;  // whether every row wants all of the tile
    for (int i = 0; i < tiles; ++i) {
      const uint32_t tile = keys + stage * (C::kStageBytes / 16);
      cuda::mbarrier_wait(k_full + stage * 8, stage_phase);
      multiply<C>(first, tile, queries);
      multiply<C>(second, tile, queries + C::kStepBytes / 16);
      if (i > 0) {
        sum_quad<C>(sum, value);
        store(1, 1, value, scale, inside);
      }
      scale = next_scale;
      next_scale = load_scale(key + C::kTileKeys);
      inside = key - own_key >= common.begin && key - own_key + C::kTileKeys <= common.end;
      cuda::wgmma_wait<1>();
      cuda::wgmma_settle(first);
      weigh<C>(first, weights[0], sum);
      sum_quad<C>(sum, value);
      store(0, 0, value, scale, inside);
      cuda::wgmma_wait<0>();
      if (lane == 0) cuda::mbarrier_arrive(k_empty + stage * 8);
      if (++stage == C::kStages) stage = 0, stage_phase ^= 1;
      cuda::wgmma_settle(second);
      weigh<C>(second, weights[1], sum);
      key += C::kTileKeys, out += C::kTileKeys;
    }
    sum_quad<C>(sum, value);
    store(1, 1, value, scale, inside);
    cuda::mbarrier_arrive(&s.q_empty[buffer]);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    score(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k, const Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared<C>& s = *reinterpret_cast<Shared<C>*>(memory);
  if (threadIdx.x == 0) {
    cuda::tma_prefetch_map(&map_q);
    cuda::tma_prefetch_map(&map_k);
    for (int i = 0; i < 2; ++i) {
      cuda::mbarrier_init(&s.described[i], 1);
      cuda::mbarrier_init(&s.q_full[i], 1 + 32);                   // the copy and the lanes that write beside it
      cuda::mbarrier_init(&s.q_empty[i], 128 * C::kGroups + 1);    // all that read, and the warp that copies keys
    }
    for (int i = 0; i < C::kStages; ++i) {
      cuda::mbarrier_init(&s.k_full[i], 1);
      cuda::mbarrier_init(&s.k_empty[i], 4 * C::kGroups);
    }
    cuda::mbarrier_init_fence();
  }
  const int64_t blocks = (a.queries + C::kQueries - 1) / C::kQueries;
  const int64_t share = find_share<C>(a, blocks, s);
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == C::kGroups) {
    cuda::fewer_registers<40>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - 4 * C::kGroups;
    if (warp == 0) copy_queries<C>(&map_q, a, s, share);
    else if (warp == 1 && threadIdx.x % 32 == 0) copy_keys<C>(&map_k, s);
  } else {
    cuda::more_registers<232>();
    score_blocks<C>(a, s);
  }
}

/// Describes q and k to the copy engine once the kernel's boxes are known.
struct Maps {
  const IndexerLogitsParams& p;
  CUtensorMap queries(int elements, int heads, int queries) const;
  CUtensorMap keys(int elements, int keys) const;
};

/// The rows of fewer than kFewKeys keys, e4m3.
void launch_short_e4m3(const IndexerLogitsParams& p, const Arguments& a);

/// Launch the kernel of the least padded head count that holds a.heads.
void launch_e4m3(const Maps& maps, const Arguments& a, cudaStream_t stream);
void launch_bf16(const Maps& maps, const Arguments& a, cudaStream_t stream);

}  // namespace dsa::indexer_logits_sm90
