// Backward of sparse attention in latent form on Hopper, the part that belongs to keys: dkv, from the P and dS that
// sm90_backward_queries.cu leaves behind.
//
// A CTA takes half of the columns (256 latent, 32 rope) of a query, keeps q and do of all heads in shared memory and
// turns every tile of P and dS into 64 keys x 288 columns, summed over all heads before they leave the SM. A job is 144
// of a tile's columns. Three warpgroups take one job after the other and turns at the tensor cores: while one
// multiplies, the others make words of what they have (packed_sums.cuh) and hand them to the copy engine, which adds
// them to global memory. Where the lists name more than kHalvesFrom keys, all queries of a chunk come with one half
// first, then with the other: half of the sums stay in the caches. Where not even these do, contributions go to the
// workspace instead, rounded to bf16, and sm90_backward_sums.cu adds them.
//
// To make and add words costs the same for 128 rows (of query and head) as for 64: where 64 rows hold a query or a
// group of queries, two neighbours are taken at once if their lists have much in common.
#include "kernels/cuda/check.h"
#include "kernels/cuda/packed_sums.cuh"
#include "kernels/sparse_mla/sm90_backward.h"
#include "kernels/sparse_mla/sm90_backward_instructions.cuh"
#include "kernels/sparse_mla/sm90_sum_layout.cuh"
#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {
namespace {

constexpr int kWorkers = 3, kThreads = 128 * (kWorkers + 1);  // warpgroups; one more only copies
constexpr int kUnits = 5, kUnitsByKey = 8;  // of weights in shared memory: P or dS of a tile for 64 heads
constexpr int kPartBytes = 8 * SumLayout::kPartWords, kRowPitch = kPartBytes + 32;  // of a key's words: 8 banks apart

template <int kBlocks>  // of 64 heads
struct Shared {
  static constexpr int kHeadPanel = kBlocks * kPanelBytes;  // 64 columns of all heads
  static constexpr int kBuffers = kBlocks == 1 ? 2 : 1;     // of a warp: words of eight keys
  alignas(1024) char q[4 * kHeadPanel];                     // 128 latent columns of a job, of the other
  alignas(1024) char rope[kHeadPanel];                      // 16 columns, the other's 16 (and 32 unused)
  alignas(1024) char g[4 * kHeadPanel];
  // Weights, then the buffers; by key there are none and more weights.
  alignas(1024) char ring[kUnits * kPanelBytes + 4 * kWorkers * kBuffers * 8 * kRowPitch];
  uint64_t full[kUnitsByKey], free[kUnitsByKey], multiplied[kWorkers], q_full, q_free;
  bool by_key, by_half;
  static_assert(sizeof(ring) >= kUnitsByKey * kPanelBytes);

  __device__ __forceinline__ char* weights(uint32_t unit) { return ring + unit * kPanelBytes; }
  __device__ __forceinline__ char* words(int warp) {
    return ring + kUnits * kPanelBytes + warp * (kBuffers * 8 * kRowPitch);
  }
};

struct Arguments {
  Lists lists;
  int64_t first_list, first_row, groups;
  int group;  // queries of a CTA: rows of the matrix products are those of all their heads
  const char* weights;
  int64_t weight_bytes;    // of a list
  const int32_t* pairs;    // lengths of the lists of two groups, more than 0: another launch takes these; or null
  const uint32_t* places;  // launched for pairs: of a key in the first list, in the second
  cuda::PackedSumsHead* head;
  uint64_t* table;
  float magic;  // of the quantum, see packed_sums.cuh
  __nv_bfloat16* contributions;  // [groups][lists.k][576]
  const int32_t* named;          // keys that the lists name; null: few
  int cached_keys;               // of more named keys, contributions go to the workspace if they may

  // A CTA's i-th of the chunk's work: half of the columns of a group of queries.
  struct Item {
    int64_t index;
    int half;
  };
  __device__ __forceinline__ Item item(int64_t i, bool by_half) const {
    if (!by_half) return {i / 2, static_cast<int>(i % 2)};
    return i < groups ? Item{i, 0} : Item{i - groups, 1};
  }
  // Of a list, 0 if another launch takes it.
  template <bool kByKey>
  __device__ __forceinline__ int length(int64_t index) const {
    return !kByKey && pairs && __ldg(pairs + index / 2) > 0 ? 0 : lists.length(first_list + index);
  }
};

template <int kBlocks>
__device__ __forceinline__ void load_rows(const CUtensorMap* map_q, const CUtensorMap* map_g, Shared<kBlocks>& s,
                                          int half, int row, int rows_on, int heads_on, uint64_t once) {
  using S = Shared<kBlocks>;
  cuda::mbarrier_arrive_expect(&s.q_full, 9 * S::kHeadPanel);
  for (int b = 0; b < kBlocks; ++b) {
    const auto load = [&](char* to, const CUtensorMap* map, int column) {
      cuda::tma_load_3d_once(to + b * kPanelBytes, map, &s.q_full, column, b * heads_on, row + b * rows_on, once);
    };
    for (int p = 0; p < 4; ++p) {
      load(s.g + p * S::kHeadPanel, map_g, half * 256 + p * 64);
      load(s.q + p * S::kHeadPanel, map_q, half * 256 + p * 64);
    }
    load(s.rope, map_q, kLatent + half * 32);
  }
}

template <int kBlocks, bool kByKey>
__device__ void load_tiles(const CUtensorMap* map_q, const CUtensorMap* map_g, const Arguments& a, Shared<kBlocks>& s) {
  constexpr int kUnits = kByKey ? kUnitsByKey : sparse_mla_sm90::kUnits;
  const uint64_t once = cuda::evict_first();
  uint32_t unit = 0, item_parity = 0;
  for (int64_t item = blockIdx.x; item < 2 * a.groups; item += gridDim.x) {
    const auto [index, half] = a.item(item, s.by_half);
    const int units = 2 * kBlocks * tiles_of(a.length<kByKey>(index));
    const char* from = a.weights + index * a.weight_bytes;
    for (int i = 0; i < units; ++i, ++unit, from += kPanelBytes) {
      const uint32_t at = unit % kUnits;
      cuda::mbarrier_wait(&s.free[at], (unit / kUnits & 1) ^ 1);
      cuda::mbarrier_arrive_expect(&s.full[at], kPanelBytes);
      cuda::bulk_load_once(s.weights(at), from, kPanelBytes, &s.full[at], once);
      if (i > 0) continue;
      cuda::mbarrier_wait(&s.q_free, item_parity ^ 1);  // q and do of the item before are still in use
      item_parity ^= 1;
      load_rows(map_q, map_g, s, half, static_cast<int>(a.first_row + index * a.group), 0, kHeadBlock, once);
    }
  }
}

// Of pairs: the weights of a tile's keys are gathered from where either group of queries has left them. By a warpgroup.
__device__ void gather_tiles(const CUtensorMap* map_q, const CUtensorMap* map_g, const Arguments& a, Shared<2>& s) {
  const uint64_t once = cuda::evict_first();
  const int thread = threadIdx.x - 128 * kWorkers, lane = threadIdx.x % 32, row = thread / 8, chunk = thread % 8;
  const uint32_t to = row * 128 + ((chunk ^ (row & 7)) << 4);  // and 16 rows further on
  uint32_t unit = 0, item_parity = 0;
  for (int item = blockIdx.x; item < 2 * a.groups; item += gridDim.x) {
    const auto [index, half] = a.item(item, s.by_half);
    const int tiles = tiles_of(a.length<false>(index));
    if (tiles == 0) continue;
    int64_t entry = index * a.lists.stride;  // the tile's first
    const char* const from = a.weights + 2 * index * a.weight_bytes;
    // Lane 8i + j has the places of the row that lanes 8i and on copy as their j-th.
    const auto load_places = [&] { return __ldg(a.places + entry + thread / 8 + 16 * (lane % 4)); };
    uint32_t next = load_places();
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t places = next;
      entry += kTile;
      if (tile + 1 < tiles) next = load_places();
#pragma unroll
      for (int u = 0; u < 4; ++u, ++unit) {
        const uint32_t at = unit % kUnits, into = cuda::shared_address(s.weights(at)) + to;
        cuda::mbarrier_wait(&s.free[at], (unit / kUnits & 1) ^ 1);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t both = __shfl_sync(~0u, places, j, 8), p = u < 2 ? both & kNowhere : both >> 16;
          const bool has = p != kNowhere;
          const uint32_t offset = (p & ~63u) * 256 + (p & 63) * 128 + ((chunk ^ (p & 7)) << 4);
          cuda::copy16_or_zero(into + j * 2048,
                               from + u / 2 * a.weight_bytes + u % 2 * kPanelBytes + (has ? offset : 0), has, once);
        }
        cuda::mbarrier_arrive_after_copies(&s.full[at]);
        if (u > 0 || tile > 0) continue;
        if (thread < 32) {  // as one: a lane that goes its own way here leaves the warp at half its speed
          cuda::mbarrier_wait(&s.q_free, item_parity ^ 1);  // q and do of the item before are still in use
          if (cuda::elect_one())
            load_rows(map_q, map_g, s, half, static_cast<int>(a.first_row + 2 * index * a.group), a.group, 0, once);
          __syncwarp();
        }
        item_parity ^= 1;
      }
    }
  }
}

// The list entries of a thread's two rows of a tile, and those before them.
struct TileEntries {
  int own[2], before[2];

  __device__ __forceinline__ void load(const int32_t* row, int first, int length) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first + 8 * h;
      own[h] = i < length ? __ldg(row + i) : -1;
      before[h] = i > 0 && i < length ? __ldg(row + i - 1) : -1;
    }
  }
};

// A thread's share of 16 keys x 144 columns of a warp, of keys lane/4 + 8h: 36 columns each, as 18 pairs of bf16 (to be
// left in the workspace), or 12 words of one key (to be added; those of the other key are on their way already).
struct Contributions {
  int key[2] = {-1, -1};          // that count
  int part = 0;                   // of the four of a row, see sm90_sum_layout.cuh
  __nv_bfloat16* rows = nullptr;  // where pairs go
  uint32_t v[2][24] = {};

  static __device__ __forceinline__ float column(const float (&d)[64], const float (&rope)[8], int h, int n) {
    return n < 32 ? d[4 * (n / 2) + 2 * h + n % 2] : rope[4 * (n / 2 - 16) + 2 * h + n % 2];
  }

  // Of the key lane/4 + 8h.
  __device__ __forceinline__ void pack_words(const float (&d)[64], const float (&rope)[8], int h,
                                             const cuda::QuantaOfWords& quanta, cuda::PackedSumsCheck& check) {
    cuda::PackedSumsCheck::Row row;
#pragma unroll
    for (int j = 0; j < 12; ++j) {
      const uint32_t raw0 = quanta.raw(column(d, rope, h, 3 * j)),
                     upper1 = quanta.raw_upper(column(d, rope, h, 3 * j + 1)),
                     upper2 = quanta.raw_upper(column(d, rope, h, 3 * j + 2));
      row.add(raw0, cuda::column_weight(3 * j), quanta);
      row.add_upper(upper1, cuda::column_weight(3 * j + 1), quanta);
      row.add_upper(upper2, cuda::column_weight(3 * j + 2), quanta);
      const uint64_t word = quanta.word(raw0, upper1, upper2);
      v[h][2 * j] = static_cast<uint32_t>(word), v[h][2 * j + 1] = static_cast<uint32_t>(word >> 32);
    }
    check.add(row, key[h] < 0 ? 0 : cuda::row_weight(key[h]) * cuda::owner_weight(part * 4 + threadIdx.x % 4), quanta);
  }

  // Adds a warp's words of the keys lane/4 + 8h by way of shared memory: the copy engine takes 384 bytes of a key at
  // once.
  template <int kBuffers>
  __device__ __forceinline__ void add_words(int h, uint64_t* table, char* shared) const {
    const int lane = threadIdx.x % 32;
    char* const row = shared + (h % kBuffers * 8 + lane / 4) * kRowPitch;
    cuda::bulk_store_wait_read<kBuffers - 1>();  // what was there is on its way
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 12; ++j)
      *reinterpret_cast<uint2*>(row + 32 * j + 8 * (lane % 4)) = make_uint2(v[h][2 * j], v[h][2 * j + 1]);
    cuda::fence_async_proxy();
    __syncwarp();
    uint64_t* const to = table + int64_t{key[h]} * SumLayout::kRowWords + part * SumLayout::kPartWords;
    if (lane % 4 == 0 && key[h] >= 0) cuda::bulk_add_u64(to, row, kPartBytes);
    cuda::bulk_commit();
  }

  // A multiple of the quantum stays one.
  __device__ __forceinline__ void pack_pairs(const float (&d)[64], const float (&rope)[8], const cuda::Quanta& quanta,
                                             cuda::PackedSumsCheck& check) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      cuda::PackedSumsCheck::Row row;
#pragma unroll
      for (int i = 0; i < 18; ++i) {
        const uint32_t x = quanta.raw(column(d, rope, h, 2 * i)), y = quanta.raw(column(d, rope, h, 2 * i + 1));
        row.add(x, 0, quanta), row.add(y, 0, quanta);
        v[h][i] = pack(quanta.rounded(x), quanta.rounded(y));
      }
      check.add(row, key[h] < 0 ? 0 : 1, quanta);
    }
  }

  // Writes the pairs to the workspace, see sm90_backward_sums.cu.
  __device__ __forceinline__ void store() const {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (key[h] < 0) continue;
      __nv_bfloat16* const row = rows + 8 * h * kDim;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int reader = part * 8 + half * 4 + q;
        const uint32_t* const x = v[h] + 9 * half;
        __stcs(reinterpret_cast<uint4*>(row) + reader, make_uint4(x[0], x[1], x[2], x[3]));
        __stcs(reinterpret_cast<uint4*>(row) + 32 + reader, make_uint4(x[4], x[5], x[6], x[7]));
        __stcs(reinterpret_cast<uint32_t*>(row) + 256 + reader, x[8]);
      }
    }
  }
};

template <int kBlocks, bool kByKey, bool kPairs>
__device__ void sum_heads(const Arguments& a, Shared<kBlocks>& s) {
  using S = Shared<kBlocks>;
  constexpr int kUnits = kByKey ? kUnitsByKey : sparse_mla_sm90::kUnits;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), group_before = (group + kWorkers - 1) % kWorkers;
  const int lane = threadIdx.x % 32, key_row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  const cuda::QuantaOfWords quanta(a.magic);
  cuda::PackedSumsCheck check;
  uint32_t jobs_before = 0, item_parity = 0;
  Contributions out;  // of the job before
  const auto send = [&] {  // what is left of it
    if constexpr (kByKey) out.store();
    else out.template add_words<S::kBuffers>(1, a.table, s.words(threadIdx.x / 32));
  };
  for (int64_t item = blockIdx.x; item < 2 * a.groups; item += gridDim.x) {
    const auto [index, half] = a.item(item, s.by_half);
    const int length = a.length<kByKey>(index), jobs = 2 * tiles_of(length);
    if (jobs == 0) continue;
    const int32_t* row = a.lists.indices + (a.first_list + index) * a.lists.stride;
    int i = (group + kWorkers - static_cast<int>(jobs_before % kWorkers)) % kWorkers;
    TileEntries next;
    next.load(row, i / 2 * kTile + key_row, length);
    cuda::mbarrier_wait(&s.q_full, item_parity);
    item_parity ^= 1;
    if (i >= jobs) cuda::mbarrier_arrive(&s.q_free);
    for (; i < jobs; i += kWorkers) {
      const uint32_t job = jobs_before + i;
      const int tile = i / 2, columns = i % 2;
      const TileEntries entries = next;  // loads beside bulk copies take thousands of cycles: a job ahead of their use
      next.load(row, (i + kWorkers) / 2 * kTile + key_row, length);
      uint32_t unit = job / 2 * (2 * kBlocks);
      const uint64_t q = cuda::operand_across_k(s.q, S::kHeadPanel) + columns * (2 * S::kHeadPanel / 16),
                     g = cuda::operand_across_k(s.g, S::kHeadPanel) + columns * (2 * S::kHeadPanel / 16),
                     r = cuda::operand_across_k(s.rope) + columns * 2;
      cuda::mbarrier_wait(&s.full[unit % kUnits], unit / kUnits & 1);
      if (job > 0) cuda::mbarrier_wait(&s.multiplied[group_before], (job - 1) / kWorkers & 1);
      if constexpr (kPairs) cuda::fence_async_proxy();
      float d[64], rope[8];
      cuda::wgmma_fence();
#pragma unroll
      for (int u = 0; u < 2 * kBlocks; ++u, ++unit) {  // P and dS of a block of heads, then of the next
        const int first = u / 2 * 4;                   // sixteen heads
        if (u > 0) {
          cuda::mbarrier_wait(&s.full[unit % kUnits], unit / kUnits & 1);
          if constexpr (kPairs) cuda::fence_async_proxy();
        }
        const uint64_t weights = cuda::operand_along_k(s.weights(unit % kUnits));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint64_t x = weights + 2 * j;
          if (u % 2 == 0) {
            cuda::wgmma_bf16_n128<false, true>(d, x, g + 128 * (first + j), u + j > 0);
          } else {
            cuda::wgmma_bf16_n128<false, true>(d, x, q + 128 * (first + j));
            cuda::wgmma_bf16_n16<false, true>(rope, x, r + 128 * (first + j), first + j > 0);
          }
        }
        cuda::wgmma_commit();
        if (u > 0) {
          cuda::wgmma_wait<1>();
          cuda::mbarrier_arrive(&s.free[(unit - 1) % kUnits]);
        }
      }
      cuda::mbarrier_arrive(&s.multiplied[group]);
      send();  // at first no key counts
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(d);
      cuda::wgmma_settle(rope);
      cuda::mbarrier_arrive(&s.free[(unit - 1) % kUnits]);
      if (i + kWorkers >= jobs) cuda::mbarrier_arrive(&s.q_free);
#pragma unroll
      for (int h = 0; h < 2; ++h) out.key[h] = a.lists.counting(entries.own[h], entries.before[h]);
      out.part = half * 2 + columns;
      if constexpr (kByKey) {
        out.rows = a.contributions + (index * a.lists.k + key_row + tile * kTile) * kDim;
        out.pack_pairs(d, rope, quanta, check);
      } else {
        out.pack_words(d, rope, 1, quanta, check);
        out.pack_words(d, rope, 0, quanta, check);
        out.template add_words<S::kBuffers>(0, a.table, s.words(threadIdx.x / 32));
      }
    }
    jobs_before += jobs;
  }
  send();
  cuda::bulk_store_wait();
  check.leave(a.head);
}

enum class Way { kAdd, kMayBeByKey, kPairs };

template <int kBlocks, Way way>
__global__ void __launch_bounds__(kThreads, 1)
    backward_keys(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_g,
                  const Arguments a) {
  constexpr bool kPairs = way == Way::kPairs, kMayBeByKey = way == Way::kMayBeByKey;
  extern __shared__ __align__(1024) char memory[];
  Shared<kBlocks>& s = *reinterpret_cast<Shared<kBlocks>*>(memory);
  if (threadIdx.x == 0) {
    cuda::tma_prefetch_map(&map_q);
    cuda::tma_prefetch_map(&map_g);
    for (int i = 0; i < kUnitsByKey; ++i) {
      cuda::mbarrier_init(&s.full[i], kPairs ? 128 : 1);
      cuda::mbarrier_init(&s.free[i], 256);
    }
    for (uint64_t& barrier : s.multiplied) cuda::mbarrier_init(&barrier, 128);
    cuda::mbarrier_init(&s.q_full, 1);
    cuda::mbarrier_init(&s.q_free, 128 * kWorkers);
    cuda::mbarrier_init_fence();
    // By way of shared memory: no load is under way when warps change their registers, and all see the same.
    const int named = a.named ? __ldg(a.named) : 0;
    s.by_key = a.contributions && named > a.cached_keys;
    s.by_half = !s.by_key && named > kHalvesFrom;
  }
  __syncthreads();
  if (kPairs && s.by_key) return;
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == kWorkers) {
    cuda::fewer_registers<kPairs ? 56 : 32>();
    if constexpr (kPairs) {
      gather_tiles(&map_q, &map_g, a, s);
    } else {
      if (threadIdx.x != 128 * kWorkers) return;
      if (kMayBeByKey && s.by_key) load_tiles<kBlocks, true>(&map_q, &map_g, a, s);
      else load_tiles<kBlocks, false>(&map_q, &map_g, a, s);
    }
  } else {
    cuda::more_registers<kPairs ? 152 : 160>();
    if (kMayBeByKey && s.by_key) sum_heads<kBlocks, true, false>(a, s);
    else sum_heads<kBlocks, false, kPairs>(a, s);
  }
}

template <int kBlocks, Way way>
void launch(const CUtensorMap& map_q, const CUtensorMap& map_g, const Arguments& a, int multiprocessors,
            cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kBlocks>);
  static_assert(kBytes <= 227 * 1024);
  cuda::check(cudaFuncSetAttribute(backward_keys<kBlocks, way>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
              "reserve shared memory for sparse_mla backward");
  const int64_t items = 2 * a.groups, most = multiprocessors;
  backward_keys<kBlocks, way>
      <<<static_cast<int>(items < most ? items : most), kThreads, kBytes, stream>>>(map_q, map_g, a);
  cuda::check(cudaGetLastError(), "launch the key sums of sparse_mla backward");
}

}  // namespace

void launch_keys(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g,
                 const Chunk& chunk, cudaStream_t stream) {
  const int blocks = p.heads > kHeadBlock ? 2 : 1;
  Arguments a{lists_of(p, chunk),
              first_list(chunk),
              chunk.first_row,
              groups_of(chunk),
              chunk.lists.group,
              chunk.weights,
              int64_t{chunk.lists.group} * p.k / kTile * blocks * kWeightBytes,
              chunk.pairs.lengths,
              nullptr,
              cuda::packed_sums_head(p.dkv_sum),
              cuda::packed_sums_rows(p.dkv_sum),
              cuda::magic_of(p.quantum),
              static_cast<__nv_bfloat16*>(chunk.contributions),
              chunk.mentions.named,
              p.cached_keys};
  const auto run = blocks == 1 ? chunk.contributions ? launch<1, Way::kMayBeByKey> : launch<1, Way::kAdd>
                               : chunk.contributions ? launch<2, Way::kMayBeByKey> : launch<2, Way::kAdd>;
  run(map_q, map_g, a, chunk.multiprocessors, stream);
  if (!chunk.pairs.lengths) return;
  a.lists = lists_of(p, chunk.pairs);
  a.first_list = 0;
  a.pairs = nullptr;
  a.places = reinterpret_cast<const uint32_t*>(chunk.pairs.places);
  a.groups = (a.groups + 1) / 2;
  launch<2, Way::kPairs>(map_q, map_g, a, chunk.multiprocessors, stream);
}

}  // namespace dsa::sparse_mla_sm90
