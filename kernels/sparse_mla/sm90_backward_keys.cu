// Backward of sparse attention in latent form on Hopper, the part that belongs to keys: dkv, from the P and dS that
// sm90_backward_queries.cu leaves behind.
//
// A CTA takes half of the columns (256 latent, 32 rope) of a query, keeps q and do of all heads in shared memory and
// turns every tile of P and dS into 64 keys x 288 columns, summed over all heads before they leave the SM. Either
// warpgroup owns 144 of the columns; while the tensor cores work on a tile, it adds the one before to global memory.
// The warpgroups take turns at the tensor cores: if both multiplied at once, both would add at once, and neither would
// use what the other leaves. Every contribution is rounded to a multiple of a power of two, after which fp32 additions
// are exact and their order has no effect. Where the sums of the keys that the lists name do not stay in the caches,
// contributions go to the workspace instead, rounded to bf16, and sm90_backward_sums.cu adds them.
// Column 16B + 8b + 2q + e of a key lies at 16B + 4q + 2b + e of dkv_sum: a thread's accumulators are four in a row.
#include "kernels/cuda/check.h"
#include "kernels/sparse_mla/sm90_backward.h"
#include "kernels/sparse_mla/sm90_backward_instructions.cuh"
#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {
namespace {

constexpr int kThreads = 384;  // the third warpgroup only copies

template <int kBlocks>  // of 64 heads
struct Shared {
  static constexpr int kHeadPanel = kBlocks * kPanelBytes;  // 64 columns of all heads
  static constexpr int kStage = kBlocks * static_cast<int>(kWeightBytes);
  // Of q: a warpgroup's 128 latent columns, its 16 rope columns (and 48 unused), the other's.
  alignas(1024) char q[6 * kHeadPanel];
  alignas(1024) char g[4 * kHeadPanel];
  alignas(1024) char weights[2][kStage];
  uint64_t full[2], free[2], multiplied[2], q_full, q_free;
};

struct Arguments {
  Lists lists;
  int64_t first_list, first_row, groups;
  int group;  // queries of a CTA: rows of the matrix products are those of all their heads
  const char* weights;
  float* dkv;
  float magic;  // 1.5 * 2^23 quanta: adding it rounds to a quantum
  __nv_bfloat16* contributions;  // [groups][lists.k][576]
  const int32_t* named;          // keys that the lists name; of more than cached_keys, the contributions go there
  int cached_keys;
};

template <int kBlocks>
__device__ void load_tiles(const CUtensorMap* map_q, const CUtensorMap* map_g, const Arguments& a, Shared<kBlocks>& s) {
  using S = Shared<kBlocks>;
  const uint64_t once = cuda::evict_first();
  uint32_t done = 0, item_parity = 0;
  for (int64_t item = blockIdx.x; item < 2 * a.groups; item += gridDim.x) {
    const int64_t index = item / 2;
    const int half = item % 2, tiles = tiles_of(a.lists.length(a.first_list + index));
    const int t = static_cast<int>(a.first_row + index * a.group);
    if (tiles == 0) continue;
    const char* from = a.weights + index * (a.lists.k / kTile) * S::kStage;
    const auto load_weights = [&] {
      const int stage = done % 2;
      cuda::mbarrier_wait(&s.free[stage], (done / 2 & 1) ^ 1);
      cuda::mbarrier_arrive_expect(&s.full[stage], S::kStage);
      cuda::bulk_load_once(s.weights[stage], from, S::kStage, &s.full[stage], once);
      from += S::kStage, ++done;
    };
    load_weights();  // while q and do of the item before are still in use
    cuda::mbarrier_wait(&s.q_free, item_parity ^ 1);
    item_parity ^= 1;
    cuda::mbarrier_arrive_expect(&s.q_full, 10 * S::kHeadPanel);
    for (int p = 0; p < 6; ++p)
      for (int b = 0; b < kBlocks; ++b) {
        const int group = p / 3, i = p % 3, value = half * 256 + group * 128 + i * 64;
        const int column = i == 2 ? kLatent + half * 32 + group * 16 : value;
        cuda::tma_load_3d_once(s.q + p * S::kHeadPanel + b * kPanelBytes, map_q, &s.q_full, column, b * kHeadBlock, t,
                               once);
        if (i < 2)
          cuda::tma_load_3d_once(s.g + (2 * group + i) * S::kHeadPanel + b * kPanelBytes, map_g, &s.q_full, value,
                                 b * kHeadBlock, t, once);
      }
    for (int tile = 1; tile < tiles; ++tile) load_weights();
  }
}

__device__ __forceinline__ float to_quantum(float x, float magic) { return __fsub_rn(__fadd_rn(x, magic), magic); }

__device__ __forceinline__ float4 trade(float4 x) {
  return make_float4(__shfl_xor_sync(~0u, x.x, 4), __shfl_xor_sync(~0u, x.y, 4), __shfl_xor_sync(~0u, x.z, 4),
                     __shfl_xor_sync(~0u, x.w, 4));
}

// The list entries of a thread's two rows of a tile, and those before them.
struct TileEntries {
  int own[2] = {-1, -1}, before[2] = {-1, -1};

  __device__ __forceinline__ void load(const int32_t* row, int first, int length) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first + 8 * h;
      own[h] = i < length ? __ldg(row + i) : -1;
      before[h] = i > 0 && i < length ? __ldg(row + i - 1) : -1;
    }
  }
};

// A warp's 16 keys x 144 columns: of keys lane/4 + 8h, v[8h + i] columns 16i + 2q + {0, 1, 8, 9}, v[16 + h] the same of
// rope.
struct Contributions {
  float4 v[18];

  __device__ __forceinline__ void round(const float (&d)[72], float magic) {
#pragma unroll
    for (int i = 0; i < 18; ++i) {
      const int at = i < 16 ? 8 * (i % 8) + 2 * (i / 8) : 64 + 2 * (i - 16);
      v[i] = make_float4(to_quantum(d[at], magic), to_quantum(d[at + 1], magic), to_quantum(d[at + 4], magic),
                         to_quantum(d[at + 5], magic));
    }
  }

  // Adds them to dkv. Four lanes hold 64 bytes of a key; they trade with the four lanes of the key beside it, so that
  // eight lanes write a whole line of 128 bytes of one key, then of the other. All trades come first, so that no
  // register waits for an addition to have read it.
  __device__ __forceinline__ void add_to(const Arguments& a, const TileEntries& entries, int column, int rope) {
    const int lane = threadIdx.x % 32;
    const bool is_odd = lane & 4;
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      const float4 traded = trade(is_odd ? v[i] : v[i + 1]);
      v[i] = is_odd ? traded : v[i], v[i + 1] = is_odd ? v[i + 1] : traded;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" : "+f"(v[i].x), "+f"(v[i].y), "+f"(v[i].z), "+f"(v[i].w));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = a.lists.counting(entries.own[h], entries.before[h]), other = __shfl_xor_sync(~0u, key, 4);
      const int even = is_odd ? other : key, odd = is_odd ? key : other, place = (is_odd ? 16 : 0) + 4 * (lane % 4);
      const auto at = [&](int of, int first) {
        return reinterpret_cast<float*>(cuda::keep(reinterpret_cast<int64_t>(a.dkv + int64_t{of} * kDim + first)));
      };
      float* const to_even = at(even, column + place);
      float* const to_odd = at(odd, column + place);
      float* const to_rope = at(key, rope + 4 * (lane % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (even >= 0) cuda::add_f32x4(to_even + 32 * i, v[8 * h + 2 * i]);
        if (odd >= 0) cuda::add_f32x4(to_odd + 32 * i, v[8 * h + 2 * i + 1]);
      }
      if (key >= 0) cuda::add_f32x4(to_rope, v[16 + h]);
    }
  }

  // Writes them to the workspace as bf16, of every 128 columns 32j + 8q + i of a lane. A multiple of the quantum stays
  // one.
  __device__ __forceinline__ void store_to(const Arguments& a, const TileEntries& entries, int64_t first_entry,
                                           int column, int rope) const {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (a.lists.counting(entries.own[h], entries.before[h]) < 0) continue;
      __nv_bfloat16* const row = a.contributions + (first_entry + 8 * h) * kDim;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 x = v[8 * h + 2 * j], y = v[8 * h + 2 * j + 1];
        __stcs(reinterpret_cast<uint4*>(row + column + 32 * j + 8 * q),
               make_uint4(pack(x.x, x.y), pack(x.z, x.w), pack(y.x, y.y), pack(y.z, y.w)));
      }
      const float4 r = v[16 + h];
      __stcs(reinterpret_cast<uint2*>(row + rope + 4 * q), make_uint2(pack(r.x, r.y), pack(r.z, r.w)));
    }
  }
};

template <int kBlocks, bool kMayBeByKey>
__device__ void sum_heads(const Arguments& a, Shared<kBlocks>& s) {
  using S = Shared<kBlocks>;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  const int key_row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  const char* const q = s.q + group * 3 * S::kHeadPanel;
  const char* const g = s.g + group * 2 * S::kHeadPanel;
  const bool by_key = kMayBeByKey && __ldg(a.named) > a.cached_keys;
  uint32_t done = 0, item_parity = 0;
  Contributions out;  // of the tile before
#pragma unroll
  for (float4& v : out.v) v = make_float4(0, 0, 0, 0);
  for (int64_t item = blockIdx.x; item < 2 * a.groups; item += gridDim.x) {
    const int64_t list = a.first_list + item / 2;
    const int half = item % 2, length = a.lists.length(list), tiles = tiles_of(length);
    if (tiles == 0) continue;
    const int32_t* row = a.lists.indices + list * a.lists.stride;
    const int column = half * 256 + group * 128, rope = kLatent + half * 32 + group * 16;
    const int64_t first_entry = item / 2 * a.lists.k + key_row;
    const auto send = [&](const TileEntries& of, int tile) {
      if (by_key) out.store_to(a, of, first_entry + tile * kTile, column, rope);
      else out.add_to(a, of, column, rope);
    };
    cuda::mbarrier_wait(&s.q_full, item_parity);
    item_parity ^= 1;
    TileEntries entries;  // of the tile before: at first none that counts
    for (int tile = 0; tile < tiles; ++tile) {
      TileEntries next;
      next.load(row, tile * kTile + key_row, length);
      cuda::mbarrier_wait(&s.full[done % 2], done / 2 & 1);
      const char* const weights = s.weights[done % 2];
      if (group == 1 || done > 0) cuda::mbarrier_wait(&s.multiplied[group ^ 1], (done - 1 + group) & 1);
      float d[72];
      cuda::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4 * kBlocks; ++j) {
        const uint64_t p = cuda::operand_along_k(weights + j / 4 * kWeightBytes) + 2 * (j % 4);
        const uint64_t ds = cuda::operand_along_k(weights + j / 4 * kWeightBytes + kPanelBytes) + 2 * (j % 4);
        cuda::wgmma_bf16_n144<false, true>(d, ds, cuda::operand_across_k(q, S::kHeadPanel) + 128 * j, j > 0);
        cuda::wgmma_bf16_n128_of_144<false, true>(d, p, cuda::operand_across_k(g, S::kHeadPanel) + 128 * j);
      }
      cuda::wgmma_commit();
      arrive_once_a_warp(&s.multiplied[group]);
      send(entries, tile - 1);
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(d);
      arrive_once_a_warp(&s.free[done % 2]);
      ++done;
      if (tile + 1 == tiles) arrive_once_a_warp(&s.q_free);
      out.round(d, a.magic);
      entries = next;
    }
    send(entries, tiles - 1);
  }
}

template <int kBlocks, bool kMayBeByKey>
__global__ void __launch_bounds__(kThreads, 1)
    backward_keys(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_g,
                  const Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared<kBlocks>& s = *reinterpret_cast<Shared<kBlocks>*>(memory);
  if (threadIdx.x == 0) {
    cuda::tma_prefetch_map(&map_q);
    cuda::tma_prefetch_map(&map_g);
    for (int i = 0; i < 2; ++i) {
      cuda::mbarrier_init(&s.full[i], 1);
      cuda::mbarrier_init(&s.free[i], 8);
      cuda::mbarrier_init(&s.multiplied[i], 4);
    }
    cuda::mbarrier_init(&s.q_full, 1);
    cuda::mbarrier_init(&s.q_free, 8);
    cuda::mbarrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 2) {
    cuda::fewer_registers<56>();
    if (threadIdx.x == 256) load_tiles<kBlocks>(&map_q, &map_g, a, s);
  } else {
    cuda::more_registers<224>();
    sum_heads<kBlocks, kMayBeByKey>(a, s);
  }
}

template <int kBlocks, bool kMayBeByKey>
void launch(const CUtensorMap& map_q, const CUtensorMap& map_g, const Arguments& a, int multiprocessors,
            cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kBlocks>);
  cuda::check(
      cudaFuncSetAttribute(backward_keys<kBlocks, kMayBeByKey>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "reserve shared memory for sparse_mla backward");
  const int64_t items = 2 * a.groups, most = multiprocessors;
  backward_keys<kBlocks, kMayBeByKey>
      <<<static_cast<int>(items < most ? items : most), kThreads, kBytes, stream>>>(map_q, map_g, a);
  cuda::check(cudaGetLastError(), "launch the key sums of sparse_mla backward");
}

}  // namespace

void launch_keys(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g,
                 const Chunk& chunk, cudaStream_t stream) {
  const int group = chunk.lists.group;
  Arguments a{{p.indices, p.indices_stride, p.lengths, p.k, static_cast<int>(p.keys)},
              chunk.first_row,
              chunk.first_row,
              (chunk.rows + group - 1) / group,
              group,
              chunk.weights,
              p.dkv_sum,
              p.quantum * 0x1.8p23f,
              static_cast<__nv_bfloat16*>(chunk.contributions),
              chunk.mentions.named,
              p.cached_keys};
  if (group > 1) {
    a.lists = {chunk.lists.keys, int64_t{group} * p.k, chunk.lists.lengths, group * p.k, static_cast<int>(p.keys)};
    a.first_list = 0;
  }
  const auto run = p.heads <= kHeadBlock ? chunk.contributions ? launch<1, true> : launch<1, false>
                                         : chunk.contributions ? launch<2, true> : launch<2, false>;
  run(map_q, map_g, a, chunk.multiprocessors, stream);
}

}  // namespace dsa::sparse_mla_sm90
