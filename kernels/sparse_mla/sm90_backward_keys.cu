// Backward of sparse attention in latent form on Hopper, the part that belongs to keys: dkv, from the P and dS that
// sm90_backward_queries.cu leaves behind.
//
// A CTA takes half of the columns (256 latent, 32 rope) of a query, keeps q and do of all heads in shared memory and turns
// every tile of P and dS into 64 keys x 288 columns, summed over all heads before they leave the SM. Two warpgroups take
// tiles in turn: one multiplies while the other adds its tile to global memory. Every contribution is rounded to a multiple
// of a power of two, after which fp32 additions are exact and their order has no effect.
// Column 16B + 8b + 2q + e of a key lies at 16B + 4q + 2b + e of dkv_sum: a thread's accumulators are then four in a row.
#include "kernels/cuda/check.h"
#include "kernels/sparse_mla/sm90_backward.h"
#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {
namespace {

constexpr int kThreads = 384;  // the third warpgroup only copies

template <int kBlocks>  // of 64 heads
struct Shared {
  static constexpr int kHeadPanel = kBlocks * kPanelBytes;  // 64 columns of all heads
  static constexpr int kStage = kBlocks * static_cast<int>(kWeightBytes);
  alignas(1024) char q[5 * kHeadPanel];  // 256 latent columns, 64 rope columns (32 of them used)
  alignas(1024) char g[4 * kHeadPanel];
  alignas(1024) char weights[2][kStage];
  uint64_t full[2], free[2], q_full, q_free;
};

struct Arguments {
  Lists lists;
  int64_t first_row, rows;
  const char* weights;
  float* dkv;
  float magic;  // 1.5 * 2^23 quanta: adding it rounds to a quantum
};

template <int kBlocks>
__device__ void load_tiles(const CUtensorMap* map_q, const CUtensorMap* map_g, const Arguments& a, Shared<kBlocks>& s) {
  using S = Shared<kBlocks>;
  int64_t done = 0;
  uint32_t item_parity = 0;
  for (int64_t item = blockIdx.x; item < 2 * a.rows; item += gridDim.x) {
    const int64_t row = item / 2, t = a.first_row + row;
    const int half = item % 2, tiles = tiles_of(a.lists.length(t));
    if (tiles == 0) continue;
    cuda::mbarrier_wait(&s.q_free, item_parity ^ 1);
    item_parity ^= 1;
    cuda::mbarrier_arrive_expect(&s.q_full, 9 * S::kHeadPanel);
    for (int p = 0; p < 5; ++p)
      for (int b = 0; b < kBlocks; ++b) {
        const int column = (p == 4 ? 8 : half * 4 + p) * 64;
        cuda::tma_load_3d(s.q + p * S::kHeadPanel + b * kPanelBytes, map_q, &s.q_full, column, b * kHeadBlock, static_cast<int>(t));
        if (p < 4)
          cuda::tma_load_3d(s.g + p * S::kHeadPanel + b * kPanelBytes, map_g, &s.q_full, column, b * kHeadBlock, static_cast<int>(t));
      }
    const char* from = a.weights + row * (a.lists.k / kTile) * S::kStage;
    for (int tile = 0; tile < tiles; ++tile, ++done) {
      const int stage = done % 2;
      cuda::mbarrier_wait(&s.free[stage], (done / 2 & 1) ^ 1);
      cuda::mbarrier_arrive_expect(&s.full[stage], S::kStage);
      cuda::bulk_load(s.weights[stage], from + int64_t{tile} * S::kStage, S::kStage, &s.full[stage]);
    }
  }
}

__device__ __forceinline__ float to_quantum(float x, float magic) { return __fsub_rn(__fadd_rn(x, magic), magic); }

__device__ __forceinline__ float4 trade(float4 x) {
  return make_float4(__shfl_xor_sync(~0u, x.x, 4), __shfl_xor_sync(~0u, x.y, 4), __shfl_xor_sync(~0u, x.z, 4), __shfl_xor_sync(~0u, x.w, 4));
}

__device__ __forceinline__ void add(float* to, float4 x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

// Adds n/4 accumulator groups of eight columns, d[4b + 2h + e], to two keys. Four lanes hold 64 bytes of a key; they trade
// with the four lanes of the key beside it, so that eight lanes write a whole line of 128 bytes of one key, then of the other.
// even, odd: this lane's place in the line of each key; null: the entry does not count.
template <int n>
__device__ __forceinline__ void add_to_keys(float* even, float* odd, const float (&d)[n], int h, float magic) {
  const bool is_odd = threadIdx.x & 4;
#pragma unroll
  for (int i = 0; i < n / 16; ++i) {
    float4 x[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = 16 * i + 8 * j + 2 * h;
      x[j] = make_float4(to_quantum(d[at], magic), to_quantum(d[at + 1], magic), to_quantum(d[at + 4], magic), to_quantum(d[at + 5], magic));
    }
    const float4 traded = trade(is_odd ? x[0] : x[1]);
    if (even) add(even + 32 * i, is_odd ? traded : x[0]);
    if (odd) add(odd + 32 * i, is_odd ? x[1] : traded);
  }
}

template <int kBlocks>
__device__ void sum_heads(const Arguments& a, Shared<kBlocks>& s) {
  using S = Shared<kBlocks>;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
  const int key_row = threadIdx.x / 32 % 4 * 16 + lane / 4;
  int64_t done = 0;
  uint32_t parity = 0, item_parity = 0;
  for (int64_t item = blockIdx.x; item < 2 * a.rows; item += gridDim.x) {
    const int64_t t = a.first_row + item / 2;
    const int half = item % 2, length = a.lists.length(t), tiles = tiles_of(length);
    if (tiles == 0) continue;
    const int32_t* row = a.lists.indices + t * a.lists.stride;
    int tile = static_cast<int>((group + done) % 2);  // the first that is this warpgroup's
    done += tiles;
    int next[2], next_before[2];  // list entries, loaded one tile ahead
    const auto load_entries = [&](int of_tile) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = of_tile * kTile + key_row + 8 * h;
        next[h] = i < length ? __ldg(row + i) : -1;
        next_before[h] = i > 0 && i < length ? __ldg(row + i - 1) : -1;
      }
    };
    load_entries(tile);
    cuda::mbarrier_wait(&s.q_full, item_parity);
    item_parity ^= 1;
    if (tile >= tiles) arrive_once_a_warp(&s.q_free);
    for (; tile < tiles; tile += 2, parity ^= 1) {
      const int own[2] = {next[0], next[1]}, before[2] = {next_before[0], next_before[1]};
      load_entries(tile + 2);
      float latent[128], rope[16];
      cuda::mbarrier_wait(&s.full[group], parity);
      cuda::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4 * kBlocks; ++j) {
        const char* weights = s.weights[group] + j / 4 * kWeightBytes;
        const uint64_t p = cuda::operand_across_k(weights) + 128 * (j % 4);
        const uint64_t ds = cuda::operand_across_k(weights + kPanelBytes) + 128 * (j % 4);
        cuda::wgmma_bf16_n256<true, true>(latent, ds, cuda::operand_across_k(s.q, S::kHeadPanel) + 128 * j, j > 0);
        cuda::wgmma_bf16_n256<true, true>(latent, p, cuda::operand_across_k(s.g, S::kHeadPanel) + 128 * j);
        cuda::wgmma_bf16_n32<true, true>(rope, ds, cuda::operand_across_k(s.q + 4 * S::kHeadPanel) + 4 * half + 128 * j, j > 0);
      }
      cuda::wgmma_commit();
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(latent);
      cuda::wgmma_settle(rope);
      arrive_once_a_warp(&s.free[group]);
      if (tile + 2 >= tiles) arrive_once_a_warp(&s.q_free);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = a.lists.counting(own[h], before[h]), other = __shfl_xor_sync(~0u, key, 4);
        const auto line = [&](int of) { return of < 0 ? nullptr : a.dkv + int64_t{of} * kDim + (lane & 4 ? 16 : 0) + 4 * (lane % 4); };
        float* const even = line(lane & 4 ? other : key);
        float* const odd = line(lane & 4 ? key : other);
        add_to_keys(even ? even + 256 * half : nullptr, odd ? odd + 256 * half : nullptr, latent, h, a.magic);
        add_to_keys(even ? even + kLatent + 32 * half : nullptr, odd ? odd + kLatent + 32 * half : nullptr, rope, h, a.magic);
      }
    }
  }
}

template <int kBlocks>
__global__ void __launch_bounds__(kThreads, 1)
    backward_keys(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_g, const Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared<kBlocks>& s = *reinterpret_cast<Shared<kBlocks>*>(memory);
  if (threadIdx.x == 0) {
    cuda::tma_prefetch_map(&map_q);
    cuda::tma_prefetch_map(&map_g);
    for (int i = 0; i < 2; ++i) {
      cuda::mbarrier_init(&s.full[i], 1);
      cuda::mbarrier_init(&s.free[i], 4);
    }
    cuda::mbarrier_init(&s.q_full, 1);
    cuda::mbarrier_init(&s.q_free, 8);
    cuda::mbarrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 2) {
    cuda::fewer_registers<40>();
    if (threadIdx.x == 256) load_tiles<kBlocks>(&map_q, &map_g, a, s);
  } else {
    cuda::more_registers<232>();
    sum_heads<kBlocks>(a, s);
  }
}

template <int kBlocks>
void launch(const CUtensorMap& map_q, const CUtensorMap& map_g, const Arguments& a, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kBlocks>);
  cuda::check(cudaFuncSetAttribute(backward_keys<kBlocks>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
              "reserve shared memory for sparse_mla backward");
  const int64_t items = 2 * a.rows, most = multiprocessors;
  backward_keys<kBlocks><<<static_cast<int>(items < most ? items : most), kThreads, kBytes, stream>>>(map_q, map_g, a);
  cuda::check(cudaGetLastError(), "launch the key sums of sparse_mla backward");
}

}  // namespace

void launch_keys(const SparseMlaBackwardParams& p, const CUtensorMap& map_q, const CUtensorMap& map_g, const Chunk& chunk,
                 cudaStream_t stream) {
  const Arguments a{{p.indices, p.indices_stride, p.lengths, p.k, static_cast<int>(p.keys)},
                    chunk.first_row, chunk.rows, chunk.weights, p.dkv_sum, p.quantum * 0x1.8p23f};
  if (p.heads <= kHeadBlock) launch<1>(map_q, map_g, a, chunk.multiprocessors, stream);
  else launch<2>(map_q, map_g, a, chunk.multiprocessors, stream);
}

}  // namespace dsa::sparse_mla_sm90
