// The indexer's loss over selected keys and its gradients on Hopper; see sparse_params.h for the formulas.
//
// A CTA takes a query at a time and walks its list twice in tiles of 64 keys. First pass: S = -(keys . q^T), 64 keys x 64
// heads; the sign bits, set exactly where q.k > 0, stay in shared memory (a word a thread and tile), the weighted sums over
// heads are the scores. Between the passes: softmax, loss and dI. Second pass: dI under the sign bits, per tile, is a left
// operand twice: dq += m^T . keys, and dk = (m w) . q, which leaves for global memory. No product is computed twice. dq takes
// m as its bf16 and the bf16 of what that leaves: dI sums to 0, so what the keys have in common would leave mostly errors.
// Every contribution to dk_sum is rounded to a multiple of a power of two, after which fp32 additions are exact and their
// order has no effect. One warpgroup computes, another gathers keys; two CTAs share a multiprocessor, so that one adds to
// memory while the other multiplies. Where dk_sum is too large for the L2 cache, all CTAs keep pace in the second pass: the
// lists ascend, so all add to one stretch of keys at a time, which stays in the cache.
//
// Column 16B + 8b + 2q + e of a key lies at 16B + 4q + 2b + e of dk_sum: a thread's accumulators are then four in a row.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/pace.cuh"
#include "kernels/cuda/quantum_sums.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/tma.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/indexer_kl/sparse_params.h"

namespace dsa {
namespace indexer_kl_sparse_sm90 {
namespace {

constexpr int kDim = 128;
constexpr int kHeads = 64;              // padded with zeros by the copy engine
constexpr int kTile = 64;               // keys
constexpr int kPanelBytes = 64 * 128;   // 64 columns of 64 rows, 128-byte swizzled
constexpr int kStages = 3;
constexpr int kThreads = 256;
constexpr int kMostEntries = 4096;
constexpr int kPaceSteps = 8;           // of a row
constexpr int64_t kPaceBytes = int64_t{20} << 20;  // of dk_sum: with more, CTAs keep pace

struct Shared {
  alignas(1024) char q[2 * kPanelBytes];
  alignas(1024) char keys[kStages][2 * kPanelBytes];
  alignas(1024) char selected[2][kPanelBytes];  // m of a tile, keys x heads: its bf16, and what that leaves of it
  float4 parts[3][4];                           // of the reductions over four warps
  uint64_t full[kStages], free[kStages], q_full, list_full, list_free;
};
// Behind it, for K entries: int key[K] (-1: the entry does not count), float score[K] (then dI), uint32_t bits[K/64][128].
__host__ __device__ constexpr size_t shared_bytes(int k) { return sizeof(Shared) + size_t(k) * (4 + 4 + 8); }
__device__ __forceinline__ int* keys_of(Shared& s) { return reinterpret_cast<int*>(&s + 1); }

struct Arguments {
  int64_t queries;
  int keys, heads, k;
  const char* key;  // [S,128] bf16
  int64_t key_bytes;
  const float* w;
  int64_t w_stride;
  const int32_t* indices;
  int64_t indices_stride;
  const int32_t* lengths;
  const float* p;
  int64_t p_stride;
  float loss_scale;
  const float* row_weight;
  float *kl, *entropy_target, *entropy_prediction;
  void* dq;
  bool dq_bf16;
  float *dw, *dk_sum;
  int* pace;    // [Pace::kCounters], null: no pace is kept
  float magic;  // 1.5 * 2^23 quanta: adding it rounds to a quantum

  __device__ __forceinline__ int length(int64_t t) const { return lengths ? min(max(__ldg(lengths + t), 0), k) : k; }
};

__device__ __forceinline__ int tiles_of(int length) { return (length + kTile - 1) / kTile; }

__device__ __forceinline__ void arrive_once_a_warp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) cuda::mbarrier_arrive(barrier);
}
__device__ __forceinline__ void sync_group() { cuda::barrier_sync<1, 128>(); }

using cuda::pack;

/// Brings n elements of 4 bytes into the L2 cache, by the second warpgroup.
__device__ __forceinline__ void prefetch(const void* from, int n) {
  for (int i = threadIdx.x - 128; i * 32 < n; i += 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + i * 128));
}

// The list of a row, then its tiles, twice. Thread i copies 16 bytes, chunk i % 16, of rows i / 16 + 8j of a tile.
__device__ void gather_tiles(const Arguments& a, Shared& s) {
  const int thread = threadIdx.x - 128, chunk = thread % 16, first_row = thread / 16;
  const uint32_t to = cuda::shared_address(s.keys[0]) + chunk / 8 * kPanelBytes + first_row * 128 + (((chunk & 7) ^ first_row) << 4);
  const char* const from = a.key + chunk * 16;
  const auto key_bytes = static_cast<uint32_t>(a.key_bytes);
  int* const list = keys_of(s);
  int stage = 0;
  uint32_t parity = 0, list_parity = 1;
  cuda::Pace pace{a.pace};
  for (int64_t t = blockIdx.x; t < a.queries; t += gridDim.x) {
    const int length = a.length(t), tiles = tiles_of(length);
    const int32_t* row = a.indices + t * a.indices_stride;
    cuda::mbarrier_wait(&s.list_free, list_parity);
    list_parity ^= 1;
#pragma unroll 8
    for (int i = thread; i < tiles * kTile; i += 128) {
      const int own = i < length ? __ldg(row + i) : -1, before = i > 0 && i < length ? __ldg(row + i - 1) : -1;
      list[i] = own >= 0 && own < a.keys && own > before ? own : -1;
    }
    cuda::mbarrier_arrive(&s.list_full);
    cuda::barrier_sync<2, 128>();
    const int64_t next = t + gridDim.x;
    if (next < a.queries) {
      const int entries = a.length(next);
      prefetch(a.indices + next * a.indices_stride, entries);
      prefetch(a.p + next * a.p_stride, entries);
    }
    const bool paced = a.pace && t - blockIdx.x + gridDim.x <= a.queries;  // every CTA has a row
    int steps = paced ? 0 : kPaceSteps;
    for (int i = 0; i < 2 * tiles; ++i) {
      if (steps < kPaceSteps && (i - tiles) * kPaceSteps >= steps * tiles) {
        if (thread == 0) pace.begin_step(gridDim.x);
        cuda::barrier_sync<2, 128>();
        ++steps;
      }
      const int* keys = list + (i < tiles ? i : i - tiles) * kTile + first_row;
      int key[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) key[j] = keys[8 * j];
      cuda::mbarrier_wait(&s.free[stage], parity ^ 1);
#pragma unroll
      for (int j = 0; j < 8; ++j)
        cuda::copy16_or_zero(to + stage * 2 * kPanelBytes + j * 1024,
                             from + uint64_t{key_bytes} * static_cast<uint32_t>(max(key[j], 0)), key[j] >= 0);
      cuda::mbarrier_arrive_after_copies(&s.full[stage]);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    if (thread == 0)
      for (; steps < kPaceSteps; ++steps) pace.begin_step(gridDim.x);
  }
}

template <class Combine>
__device__ __forceinline__ float4 reduce(float4 x, float4* parts, const Combine& combine) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2)
    x = combine(x, make_float4(__shfl_xor_sync(~0u, x.x, bit), __shfl_xor_sync(~0u, x.y, bit), __shfl_xor_sync(~0u, x.z, bit),
                               __shfl_xor_sync(~0u, x.w, bit)));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  sync_group();
  return combine(combine(parts[0], parts[1]), combine(parts[2], parts[3]));
}

__device__ __forceinline__ float4 add4(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Scores become dI; the row's loss and entropies leave.
__device__ void differentiate_loss(const Arguments& a, Shared& s, int64_t t, int entries, float* score, const int* key) {
  const int thread = threadIdx.x;
  const float* p_row = a.p + t * a.p_stride;
  float4 most = make_float4(-INFINITY, 0, 0, 0);  // greatest score, entries that count
  for (int i = thread; i < entries; i += 128) most.x = fmaxf(most.x, score[i]), most.y += key[i] >= 0;
  most = reduce(most, s.parts[0], [](float4 x, float4 y) { return make_float4(fmaxf(x.x, y.x), x.y + y.y, 0, 0); });
  const bool learns = most.y > 1;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int i = thread; i < entries; i += 128)
    if (key[i] >= 0) sum.x += expf(score[i] - most.x);
  const float lse = most.x + logf(reduce(sum, s.parts[1], add4).x);
  const float scale = learns ? a.loss_scale * (a.row_weight ? __ldg(a.row_weight + t) : 1.f) : 0.f;
  float4 sums = make_float4(0, 0, 0, 0);  // KL and the two entropies
  for (int first = thread; first < entries; first += 8 * 128) {
    float p[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int i = first + 128 * n;
      p[n] = i < entries && key[i] >= 0 ? __ldg(p_row + i) : 0.f;
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int i = first + 128 * n;
      if (i >= entries) break;
      float d = 0;
      if (key[i] >= 0 && learns) {
        const float log_pi = score[i] - lse, pi = expf(log_pi);
        if (p[n] > 0) {
          const float log_p = logf(p[n]);
          sums.x = fmaf(p[n], log_p - log_pi, sums.x);
          sums.y = fmaf(-p[n], log_p, sums.y);
        }
        sums.z = fmaf(-pi, log_pi, sums.z);
        d = scale * (pi - p[n]);
      }
      score[i] = d;
    }
  }
  sums = reduce(sums, s.parts[2], add4);  // after it, dI is there for all
  if (thread == 0) {
    if (a.kl) a.kl[t] = sums.x;
    if (a.entropy_target) a.entropy_target[t] = sums.y;
    if (a.entropy_prediction) a.entropy_prediction[t] = sums.z;
  }
}

__device__ __forceinline__ float to_quantum(float x, float magic) { return __fsub_rn(__fadd_rn(x, magic), magic); }

__device__ __forceinline__ float4 trade(float4 x) {
  return make_float4(__shfl_xor_sync(~0u, x.x, 4), __shfl_xor_sync(~0u, x.y, 4), __shfl_xor_sync(~0u, x.z, 4), __shfl_xor_sync(~0u, x.w, 4));
}

__device__ __forceinline__ void add(float* to, float4 x, bool wanted) {
  asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %5, 0;\n @p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(int{wanted})
               : "memory");
}

// The signs of a tile's accumulators: that of 4b + 2h + e is bit 31 - 8(2h + e) - b. A shift by b brings four of them to the
// tops of the bytes.
__device__ __forceinline__ uint32_t sign_word(const float (&x)[32]) {
  uint32_t part[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 32; ++i) part[i % 4] = __funnelshift_l(__float_as_uint(x[i]), part[i % 4], 1);
  return part[0] << 24 | part[1] << 16 | part[2] << 8 | part[3];
}
/// 0xFFFF in the low half where the top bit of byte 3 (h = 0) or 1 is set, in the high half for byte 2 or 0.
__device__ __forceinline__ uint32_t signs(uint32_t x, int h) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %1, %2;" : "=r"(y) : "r"(x), "r"(h == 0 ? 0xAABB : 0x8899));
  return y;
}

// Adds row half h of a tile of dk. Four lanes hold 64 bytes of a key; they trade with the four lanes of the key beside it, so
// that eight lanes write a whole line of 128 bytes of one key, then of the other. key: of this lane's row, -1: none.
__device__ __forceinline__ void add_to_keys(const Arguments& a, int key, const float (&d)[64], int h) {
  const bool is_odd = threadIdx.x & 4;
  const int other = __shfl_xor_sync(~0u, key, 4), even_key = is_odd ? other : key, odd_key = is_odd ? key : other;
  float* const place = a.dk_sum + (is_odd ? 16 : 0) + 4 * (threadIdx.x % 4);
  float* const even = place + int64_t{even_key} * kDim;
  float* const odd = place + int64_t{odd_key} * kDim;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float4 x[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = 16 * i + 8 * j + 2 * h;
      x[j] = make_float4(to_quantum(d[at], a.magic), to_quantum(d[at + 1], a.magic), to_quantum(d[at + 4], a.magic), to_quantum(d[at + 5], a.magic));
    }
    const float4 traded = trade(is_odd ? x[0] : x[1]);
    add(even + 32 * i, is_odd ? traded : x[0], even_key >= 0);
    add(odd + 32 * i, is_odd ? x[1] : traded, odd_key >= 0);
  }
}

__device__ void differentiate(const CUtensorMap* map_q, const Arguments& a, Shared& s) {
  const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4, quad = lane % 4;
  const int* const key = keys_of(s);
  float* const score = reinterpret_cast<float*>(keys_of(s) + a.k);
  uint32_t* const bits = reinterpret_cast<uint32_t*>(score + a.k) + thread;
  int stage = 0;
  uint32_t parity = 0, row_parity = 0;
  int last_stage = 0;
  uint32_t last_parity = 0;
  const auto next_stage = [&] {
    last_stage = stage, last_parity = parity;
    if (++stage == kStages) stage = 0, parity ^= 1;
  };
  for (int64_t t = blockIdx.x; t < a.queries; t += gridDim.x) {
    if (thread == 0) {
      cuda::mbarrier_arrive_expect(&s.q_full, sizeof s.q);
      for (int p = 0; p < 2; ++p) cuda::tma_load_3d(s.q + p * kPanelBytes, map_q, &s.q_full, p * 64, 0, static_cast<int>(t));
    }
    const int tiles = tiles_of(a.length(t));
    float2 w[8];  // of heads 8b + 2 quad and the next
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      const int j = 8 * b + 2 * quad;
      w[b].x = j < a.heads ? __ldg(a.w + t * a.w_stride + j) : 0.f;
      w[b].y = j + 1 < a.heads ? __ldg(a.w + t * a.w_stride + j + 1) : 0.f;
    }
    cuda::mbarrier_wait(&s.list_full, row_parity);
    cuda::mbarrier_wait(&s.q_full, row_parity);
    row_parity ^= 1;

    for (int tile = 0; tile < tiles; ++tile, next_stage()) {
      float x[32];
      cuda::mbarrier_wait(&s.full[stage], parity);
      cuda::fence_async_proxy();
      cuda::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; ++i)
        cuda::wgmma_bf16_n64<false, false, -1>(x, cuda::operand_along_k(s.keys[stage] + i / 4 * kPanelBytes) + 2 * (i % 4),
                                               cuda::operand_along_k(s.q + i / 4 * kPanelBytes) + 2 * (i % 4), i > 0);
      cuda::wgmma_commit();
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(x);
      arrive_once_a_warp(&s.free[stage]);
      bits[tile * 128] = sign_word(x);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float even = 0, odd = 0;
#pragma unroll
        for (int b = 0; b < 8; ++b) {
          even = fmaf(fmaxf(-x[4 * b + 2 * h], 0.f), w[b].x, even);
          odd = fmaf(fmaxf(-x[4 * b + 2 * h + 1], 0.f), w[b].y, odd);
        }
        float sum = even + odd;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int i = tile * kTile + row + 8 * h;
        if (quad == 0) score[i] = key[i] >= 0 ? sum : -INFINITY;
      }
    }
    sync_group();
    differentiate_loss(a, s, t, tiles * kTile, score, key);

    float dq[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) dq[i] = 0;
    for (int tile = 0; tile < tiles; ++tile, next_stage()) {
      const uint32_t word = bits[tile * 128];
      cuda::mbarrier_wait(&s.free[last_stage], last_parity);  // all warps have multiplied what was selected before
      uint32_t g[4][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = row + 8 * h;
        const float d = score[tile * kTile + r];
        const uint32_t twice = pack(d, d);
        const float rest = d - __uint_as_float(twice << 16);
        const uint32_t rest_twice = pack(rest, rest);
#pragma unroll
        for (int b = 0; b < 8; ++b) {
          const uint32_t positive = signs(word << b, h);
          g[b / 2][b % 2 * 2 + h] = pack(d * w[b].x, d * w[b].y) & positive;
          const int place = r * 128 + ((b ^ (r & 7)) << 4) + 4 * quad;
          *reinterpret_cast<uint32_t*>(s.selected[0] + place) = twice & positive;
          *reinterpret_cast<uint32_t*>(s.selected[1] + place) = rest_twice & positive;
        }
      }
      cuda::fence_async_proxy();
      sync_group();
      cuda::mbarrier_wait(&s.full[stage], parity);
      cuda::fence_async_proxy();
      float dk[64];
      cuda::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) cuda::wgmma_bf16_n128<true>(dk, g[j], cuda::operand_across_k(s.q, kPanelBytes) + 128 * j, j > 0);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint64_t keys = cuda::operand_across_k(s.keys[stage], kPanelBytes) + 128 * j;
        cuda::wgmma_bf16_n128<true, true>(dq, cuda::operand_across_k(s.selected[0]) + 128 * j, keys);
        cuda::wgmma_bf16_n128<true, true>(dq, cuda::operand_across_k(s.selected[1]) + 128 * j, keys);
      }
      cuda::wgmma_commit();
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(dk);
      cuda::wgmma_settle(dq);
      arrive_once_a_warp(&s.free[stage]);
#pragma unroll
      for (int h = 0; h < 2; ++h) add_to_keys(a, key[tile * kTile + row + 8 * h], dk, h);
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = row + 8 * h;
      float dw = 0;
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        const uint32_t q = *reinterpret_cast<const uint32_t*>(s.q + b / 8 * kPanelBytes + j * 128 + (((b ^ j) & 7) << 4) + 4 * quad);
        dw = fmaf(__uint_as_float(q << 16), dq[4 * b + 2 * h], dw);
        dw = fmaf(__uint_as_float(q & 0xFFFF0000u), dq[4 * b + 2 * h + 1], dw);
      }
      dw += __shfl_xor_sync(~0u, dw, 1);
      dw += __shfl_xor_sync(~0u, dw, 2);
      if (j >= a.heads) continue;
      const float by = __ldg(a.w + t * a.w_stride + j);
      const int64_t at = t * a.heads + j;
      if (quad == 0) a.dw[at] = dw;
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        const int64_t place = at * kDim + 8 * b + 2 * quad;
        const float x = by * dq[4 * b + 2 * h], y = by * dq[4 * b + 2 * h + 1];
        if (a.dq_bf16) *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(a.dq) + place) = pack(x, y);
        else *reinterpret_cast<float2*>(static_cast<float*>(a.dq) + place) = make_float2(x, y);
      }
    }
    arrive_once_a_warp(&s.list_free);
    sync_group();  // q and scores of the row are read
  }
}

__global__ void __launch_bounds__(kThreads, 2) sparse_loss(const __grid_constant__ CUtensorMap map_q, const Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      cuda::mbarrier_init(&s.full[i], 128);
      cuda::mbarrier_init(&s.free[i], 4);
    }
    cuda::mbarrier_init(&s.q_full, 1);
    cuda::mbarrier_init(&s.list_full, 128);
    cuda::mbarrier_init(&s.list_free, 4);
    cuda::mbarrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 1) {
    cuda::fewer_registers<64>();
    gather_tiles(a, s);
  } else {
    cuda::more_registers<192>();
    differentiate(&map_q, a, s);
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace
}  // namespace indexer_kl_sparse_sm90

bool sm90_supports(const IndexerKlSparseParams& p, const char** why_not) {
  using namespace indexer_kl_sparse_sm90;
  const auto no = [&](const char* why) { return *why_not = why, false; };
  if (!cuda::is_hopper()) return no("the current device is not of compute capability 9.0");
  if (p.heads < 1 || p.heads > kHeads) return no("the number of heads is not in 1 to 64");
  if (p.dim != kDim) return no("the head size is not 128");
  if (p.k < kTile || p.k > kMostEntries || p.k % kTile) return no("the list length is not a multiple of 64 up to 4096");
  if (p.queries < 0 || p.keys < 0 || p.keys > int64_t{1} << 30 || p.queries > int64_t{1} << 30)
    return no("more than 2^30 queries or keys");
  if (p.q_stride % 8 || p.k_stride % 8) return no("a stride of q or k is not a multiple of 8");
  if (!aligned(p.q) || !aligned(p.key) || !aligned(p.dq) || !aligned(p.dk_sum) || !aligned(p.workspace))
    return no("q, k, dq, dk_sum or the workspace is not 16-byte aligned");
  int exponent;
  if (p.quantum != 0 && std::frexp(p.quantum, &exponent) != 0.5f) return no("the quantum is no power of two");
  return true;
}

size_t indexer_kl_sparse_workspace_bytes() { return cuda::Pace::kCounters * sizeof(int); }

void launch_indexer_kl_sparse_sm90(const IndexerKlSparseParams& p) {
  using namespace indexer_kl_sparse_sm90;
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot run indexer_kl over selected keys for Hopper (") + why + ") choose another implementation");
  if (p.workspace_bytes < indexer_kl_sparse_workspace_bytes())
    throw std::runtime_error("cannot run indexer_kl over selected keys (the workspace of " + std::to_string(p.workspace_bytes) +
                             " bytes is too small) give indexer_kl_sparse_workspace_bytes()");
  if (p.queries == 0) return;
  const CUtensorMap map_q = cuda::make_tensor_map(
      p.q, {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, {kDim, uint64_t(p.heads), uint64_t(p.queries)}, {kDim * 2, uint64_t(p.q_stride) * 2},
            {64, kHeads, 1}});
  int* const pace = p.keys * kDim * int64_t{sizeof(float)} > kPaceBytes ? static_cast<int*>(p.workspace) : nullptr;
  if (pace) cuda::check(cudaMemsetAsync(pace, 0, cuda::Pace::kCounters * sizeof(int), p.stream), "clear the pace of indexer_kl");
  const Arguments a{p.queries, static_cast<int>(p.keys), p.heads, p.k, static_cast<const char*>(p.key), p.k_stride * 2, p.w, p.w_stride,
                    p.indices, p.indices_stride, p.lengths, p.p_sel, p.p_stride, p.loss_scale, p.row_weight, p.kl, p.entropy_target,
                    p.entropy_prediction, p.dq, p.dq_bf16, p.dw, p.dk_sum, pace, p.quantum * 0x1.8p23f};
  const auto bytes = static_cast<int>(shared_bytes(p.k));
  cuda::check(cudaFuncSetAttribute(sparse_loss, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "reserve shared memory for indexer_kl");
  const int64_t most = cuda::multiprocessors() * (bytes <= 113 * 1024 ? 2 : 1);
  sparse_loss<<<static_cast<int>(std::min(p.queries, most)), kThreads, bytes, p.stream>>>(map_q, a);
  cuda::check(cudaGetLastError(), "launch indexer_kl over selected keys");
}

void launch_indexer_kl_sparse_finish_sm90(const float* dk_sum, int64_t keys, void* dk, bool bf16, float* amax, cudaStream_t stream) {
  cuda::launch_finish_quantum_sums(dk_sum, keys * indexer_kl_sparse_sm90::kDim, dk, bf16, amax, stream);
}

}  // namespace dsa
