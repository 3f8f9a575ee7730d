// The indexer's loss over selected keys and its gradients on Hopper; see sparse_params.h for the formulas.
//
// A CTA takes a query at a time and walks its list once in tiles of 64 keys. Eight warps:
//  * Four multiply. S = -(q . keys^T), 64 heads x 64 keys, has its sign bits set exactly where q.k > 0; m is dI under
//    these bits. m is a left operand in registers, dq += m . keys, and with w one in shared memory, dk = (m w)^T . q.
//    dq takes m as its bf16 and the bf16 of what that leaves: dI sums to 0, so what the keys have in common would leave
//    mostly errors. dw = q . (sum m k) comes from the same sum.
//  * Two gather keys and, as they have the score and the target of every entry, make softmax, loss and dI before S is
//    there. The sums of the next row's softmax are made on the way.
//  * Two add dk to memory. Contributions are integers packed three to a word (packed_sums.cuh), so that their order has
//    no effect; a key's words leave shared memory in one bulk reduction.
// Two CTAs share a multiprocessor. The order of a row's tiles suits the L2 cache. Where rows list the same keys, or
// dk_sum fits into the cache, every row begins at another tile: additions to one key wait for each other. Otherwise all
// CTAs keep pace and go through their lists, which ascend, up and down in turns: all gather and add in one stretch of
// keys at a time, which stays in the cache. Where one half of the lists lies much denser than the other, they take a
// tile of each in turn: the wide half misses the cache, in the dense one additions wait for each other, and both at
// once take less time than one after the other.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/check.h"
#include "kernels/cuda/pace.cuh"
#include "kernels/cuda/packed_sums.cuh"
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
constexpr int kWordsEach = 11;          // of a key, a thread of four: 32 columns
constexpr int kRowBytes = 4 * kWordsEach * 8;
constexpr int kMostEntries = 4096;
constexpr int kWordTiles = 7;           // of 16 keys, on their way from a computing warp to memory
constexpr int kPaceSteps = 4;           // of a row
constexpr int64_t kPaceBytes = int64_t{20} << 20;  // of dk_sum: with more, CTAs may keep pace

// A key's words: its owners are the four lanes that hold it as accumulators, one word of each in turn.
struct Layout {
  static constexpr int kRowWords = 48, kColumns = kDim;  // whole lines, 4 words stay 0
  static constexpr __host__ __device__ int owner(int word) { return word % 4; }
  static constexpr __host__ __device__ int first(int word) { return word / 4 * 3; }
  static constexpr __host__ __device__ int column(int owner, int n) {
    return n < 32 ? 8 * (n / 2) + 2 * owner + n % 2 : -1;
  }
};

struct Shared {
  alignas(1024) char q[2 * kPanelBytes];
  alignas(1024) char keys[kStages][2 * kPanelBytes];
  alignas(1024) char gradient[kPanelBytes];   // m w of a tile, heads x keys
  alignas(128) char words[kWordTiles][16 * kRowBytes];  // of dk
  uint2 d[kStages][kTile / 2];                // dI of two neighbours: their bf16, and what that leaves of them
  alignas(16) int key[kStages][kTile];        // of entry i at 16 (i % 4) + i / 4; -1: it does not count
  float4 parts[3][2];                         // of the reductions over two warps
  int word_key[kWordTiles][16];               // whose words they are
  uint64_t full[kStages], free[kStages], q_full, words_full[kWordTiles], words_free[kWordTiles];
};

enum class Path { AROUND, UP_AND_DOWN, BOTH_HALVES };

// Of a launch with a large dk_sum.
struct Plan {
  int pace[cuda::Pace::kCounters];
  Path path;
};

struct Arguments {
  int queries, keys, heads, k;
  const char* key;  // [S,128] bf16
  int64_t key_bytes;
  const float* w;
  int64_t w_stride;
  const int32_t* indices;
  int64_t indices_stride;
  const int32_t* lengths;
  const float* score;
  int64_t score_stride;
  const float* p;
  int64_t p_stride;
  float loss_scale;
  const float* row_weight;
  float *kl, *entropy_target, *entropy_prediction;
  void* dq;
  bool dq_bf16;
  float* dw;
  cuda::PackedSumsHead* head;
  uint64_t* dk_sum;  // its rows
  Plan* plan;   // null: no pace is kept
  float magic;  // 1.5 * 2^23 quanta: adding it rounds to a quantum

  __device__ __forceinline__ int length(int64_t t) const {
    if (t >= queries) return 0;
    return lengths ? min(max(__ldg(lengths + t), 0), k) : k;
  }
};

__device__ __forceinline__ int tiles_of(int length) { return (length + kTile - 1) / kTile; }

// The order of a row's tiles: up, down, a tile of each half in turn, or up from somewhere and round.
struct Order {
  int turn, first, step, rest, half;

  __device__ __forceinline__ Order(int64_t t, int tiles, Path path, bool down) {
    first = down ? tiles - 1 : 0, step = down ? -1 : 1, turn = tiles;
    if (path == Path::AROUND)
      first = static_cast<int>(__umulhi(cuda::odd_hash(static_cast<uint32_t>(t)), tiles)), turn -= first, step = 1;
    rest = -turn;
    half = path == Path::BOTH_HALVES ? (tiles + 1) / 2 : 0;
  }
  __device__ __forceinline__ int tile(int i) const {
    const int at = i < turn ? first + step * i : rest + i;
    return half ? at % 2 * half + at / 2 : at;
  }
};

__device__ __forceinline__ void sync_computing() { cuda::barrier_sync<1, 128>(); }
__device__ __forceinline__ void sync_gathering() { cuda::barrier_sync<2, 64>(); }
/// Whether x holds in all threads that gather.
__device__ __forceinline__ bool sync_gathering_and(bool x) {
  uint32_t all;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.b32 p, %1, 0;\n"
      "barrier.cta.red.and.pred q, 2, 64, p;\n selp.u32 %0, 1, 0, q;\n}" : "=r"(all) : "r"(uint32_t{x}) : "memory");
  return all;
}

using cuda::pack;

template <class Combine>
__device__ __forceinline__ float4 reduce(float4 x, float4* parts, const Combine& combine) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2)
    x = combine(x, make_float4(__shfl_xor_sync(~0u, x.x, bit), __shfl_xor_sync(~0u, x.y, bit),
                               __shfl_xor_sync(~0u, x.z, bit), __shfl_xor_sync(~0u, x.w, bit)));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32 - 4] = x;
  sync_gathering();
  return combine(parts[0], parts[1]);
}

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ uint64_t cache_policy(bool evict_first) {
  uint64_t policy;
  if (evict_first) asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// A list's entry. key: -1 where it does not count.
struct Entry {
  int key, before;
  float score, p;

  __device__ __forceinline__ void load(const Arguments& a, int64_t t, int i, int length) {
    key = before = -1, score = p = 0;
    if (i >= length) return;
    key = __ldg(a.indices + t * a.indices_stride + i);
    if (i > 0) before = __ldg(a.indices + t * a.indices_stride + i - 1);
    score = __ldg(a.score + t * a.score_stride + i);
    p = __ldg(a.p + t * a.p_stride + i);
  }
  __device__ __forceinline__ bool counts(const Arguments& a) const { return key >= 0 && key < a.keys && key > before; }
};

// The greatest score of a row and the sum of exponentials, as far as its entries have been seen, an entry a thread at a
// time.
struct RowSums {
  int64_t row;
  int length, seen = 0;  // tiles
  Entry next;
  float most = -FLT_MAX, sum = 0, count = 0;

  __device__ __forceinline__ RowSums(const Arguments& a, int64_t t, int entries) : row(t), length(entries) {
    next.load(a, row, threadIdx.x - 128, length);
  }
  __device__ __forceinline__ int tiles() const { return tiles_of(length); }
  __device__ __forceinline__ void see(const Arguments& a, int upto) {
    for (const int end = min(upto, tiles()); seen < end;) {
      const bool counts = next.counts(a);
      const float score = counts ? next.score : -INFINITY, above = fmaxf(most, score);
      sum = sum * __expf(most - above) + __expf(score - above);
      most = above, count += counts;
      next.load(a, row, ++seen * kTile + threadIdx.x - 128, length);
    }
  }
};

// What a row's dI needs of all its entries.
struct RowLoss {
  float lse, scale;
  bool learns;
  float4 sums = make_float4(0, 0, 0, 0);  // this thread's share of KL and the two entropies

  template <class S>
  __device__ __forceinline__ RowLoss(const Arguments& a, S& s, const RowSums& row) {
    const float4 top = reduce(make_float4(row.most, row.count, 0, 0), s.parts[0],
                              [](float4 x, float4 y) { return make_float4(fmaxf(x.x, y.x), x.y + y.y, 0, 0); });
    const float share = row.sum * __expf(row.most - top.x);
    lse = top.x + logf(reduce(make_float4(share, 0, 0, 0), s.parts[1], add4).x);
    learns = top.y > 1;
    scale = learns ? a.loss_scale * (a.row_weight ? __ldg(a.row_weight + row.row) : 1.f) : 0.f;
  }
  __device__ __forceinline__ float differentiate(const Entry& e, bool counts) {
    const bool valid = counts && learns;
    const float log_pi = valid ? e.score - lse : 0.f, pi = valid ? __expf(log_pi) : 0.f, p = valid ? e.p : 0.f;
    const float normal = p >= FLT_MIN ? p : 0.f, log_p = __logf(normal > 0 ? normal : 1.f);
    sums.x = fmaf(normal, log_p - log_pi, sums.x);
    sums.y = fmaf(-normal, log_p, sums.y);
    sums.z = fmaf(-pi, log_pi, sums.z);
    return scale * (pi - p);
  }
  template <class S>
  __device__ __forceinline__ void report(const Arguments& a, S& s, int64_t t) {
    const float4 all = reduce(sums, s.parts[2], add4);
    if (threadIdx.x != 128) return;
    if (a.kl) a.kl[t] = all.x;
    if (a.entropy_target) a.entropy_target[t] = all.y;
    if (a.entropy_prediction) a.entropy_prediction[t] = all.z;
  }
};

__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xFFFFFFFF;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}
__device__ __forceinline__ void bulk_add(uint64_t* to, uint32_t from, bool wanted) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %3, 0;\n"
      "@p cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u64 [%0], [%1], %2;\n}" ::"l"(to), "r"(from),
      "n"(kRowBytes), "r"(int{wanted})
      : "memory");
}

// Two warps: dI and keys of a tile to shared memory, an entry a thread, then the keys. Thread i copies 16 bytes, chunk
// i % 16, of rows i / 16 + 4j of a tile.
__device__ void gather_tiles(const Arguments& a, Shared& s) {
  const int thread = threadIdx.x - 128, chunk = thread % 16, first_row = thread / 16;
  const uint32_t to =
      cuda::shared_address(s.keys[0]) + chunk / 8 * kPanelBytes + first_row * 128 + (((chunk & 7) ^ first_row) << 4);
  const uint64_t from = cuda::keep(reinterpret_cast<int64_t>(a.key + chunk * 16));
  const auto key_bytes = static_cast<uint32_t>(a.key_bytes);
  const Path path = a.plan ? a.plan->path : Path::AROUND;
  const bool paced = path != Path::AROUND;
  const uint64_t policy = cache_policy(/*evict_first=*/!paced);  // keys give way to sums
  int stage = 0;
  uint32_t parity = 0;
  cuda::Pace pace{a.plan ? a.plan->pace : nullptr};
  bool down = false;
  RowSums next(a, blockIdx.x, a.length(blockIdx.x));
  for (int t = blockIdx.x; t < a.queries; t += gridDim.x) {
    const int length = next.length, tiles = next.tiles();
    const Order order(t, tiles, path, down);
    down = !down;
    const auto load = [&](Entry& entry, int i) {
      entry.load(a, t, order.tile(i) * kTile + thread, i < tiles ? length : 0);
    };
    Entry even, odd;  // of the next tiles: a load waits long behind the copies
    load(even, 0), load(odd, 1);
    next.see(a, tiles);
    RowLoss row(a, s, next);
    next = RowSums(a, t + gridDim.x, a.length(t + gridDim.x));
    const bool together = paced && t - blockIdx.x + gridDim.x <= a.queries;  // every CTA has a row
    int step = together ? 0 : kPaceSteps;
    const auto gather = [&](int i, Entry& entry) {
      if (step < kPaceSteps && i * kPaceSteps >= step * tiles) {
        if (thread == 0) pace.begin_step(gridDim.x);
        sync_gathering();
        ++step;
      }
      const bool counts = entry.counts(a);
      const float d = row.differentiate(entry, counts);
      const int own_key = counts ? entry.key : -1;
      load(entry, i + 2);
      const __nv_bfloat16 high = __float2bfloat16_rn(d), rest = __float2bfloat16_rn(d - __bfloat162float(high));
      cuda::mbarrier_wait(&s.free[stage], parity ^ 1);
      auto* const to_d = reinterpret_cast<__nv_bfloat16*>(&s.d[stage][thread / 2]) + thread % 2;
      to_d[0] = high, to_d[2] = rest;
      s.key[stage][thread % 4 * 16 + thread / 4] = own_key;
      const bool all_count = sync_gathering_and(counts);
      cuda::mbarrier_arrive(&s.full[stage]);
      const uint32_t to_even = to + stage * 2 * kPanelBytes, to_odd = to_even ^ 64;
      const auto copy = [&](int j, int key, bool read) {
        const uint64_t row = from + uint64_t{key_bytes} * static_cast<uint32_t>(key);
        cuda::copy16_or_zero((j % 2 ? to_odd : to_even) + j * 512, reinterpret_cast<const void*>(row), read, policy);
      };
#pragma unroll
      for (int j = 0; j < 16; j += 4) {
        const int4 keys = *reinterpret_cast<const int4*>(&s.key[stage][first_row * 16 + j]);
        const int key[4] = {keys.x, keys.y, keys.z, keys.w};
        if (all_count) {  // without a condition each
#pragma unroll
          for (int n = 0; n < 4; ++n) copy(j + n, key[n], true);
        } else {
#pragma unroll
          for (int n = 0; n < 4; ++n) copy(j + n, max(key[n], 0), key[n] >= 0);
        }
      }
      cuda::mbarrier_arrive_after_copies(&s.full[stage]);
      if (++stage == kStages) stage = 0, parity ^= 1;
      next.see(a, i + 1);
    };
    for (int i = 0; i < tiles; i += 2) {
      gather(i, even);
      if (i + 1 < tiles) gather(i + 1, odd);
    }
    if (thread == 0)
      for (; step < kPaceSteps; ++step) pace.begin_step(gridDim.x);
    row.report(a, s, t);
  }
}

__device__ __forceinline__ void next_words(uint32_t& at, uint32_t& parity) {
  at += 4;
  if (at >= kWordTiles) at -= kWordTiles, parity ^= 1;
}

__device__ __forceinline__ void add_some_words(const Arguments& a, Shared& s, uint32_t at, uint32_t parity,
                                               bool elected) {
  const uint32_t words = cuda::shared_address(s.words[at]);
  cuda::mbarrier_wait(&s.words_full[at], parity);
  const int own_key = s.word_key[at][threadIdx.x % 16];
  int key[16];
#pragma unroll
  for (int n = 0; n < 16; ++n) key[n] = __shfl_sync(~0u, own_key, n);
#pragma unroll
  for (int n = 0; n < 16; ++n)
    bulk_add(a.dk_sum + uint64_t{uint32_t(key[n])} * Layout::kRowWords, words + n * kRowBytes, elected && key[n] >= 0);
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  cuda::bulk_store_wait_read();
  cuda::mbarrier_arrive(&s.words_free[at]);
}

// Two warps: the words of keys leave, those of two computing warps each, a key in one piece.
__device__ void add_words(const Arguments& a, Shared& s) {
  const int half = threadIdx.x / 32 - 6;
  const bool elected = elect_one();
  uint32_t at = 2 * half, parity = 0;  // words of the first of the two
  for (int t = blockIdx.x; t < a.queries; t += gridDim.x) {
    for (int left = tiles_of(a.length(t)); left > 0; --left) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
        add_some_words(a, s, (at + n) % kWordTiles, parity ^ (at + n) / kWordTiles, elected);
      next_words(at, parity);
    }
  }
  cuda::bulk_store_wait();
}

/// All ones in each half whose value's sign bit is set.
__device__ __forceinline__ uint32_t signs(float low, float high) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, 0xFFBB;" : "=r"(y) : "r"(__float_as_uint(low)), "r"(__float_as_uint(high)));
  return y;
}
using cuda::high_half;
using cuda::low_half;

__device__ void differentiate(const CUtensorMap* map_q, const Arguments& a, Shared& s) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, row = warp * 16 + lane / 4, quad = lane % 4;
  const uint32_t gradient =
      cuda::shared_address(s.gradient) + (warp * 16 + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4);
  const cuda::QuantaOfWords quanta(a.magic);
  const uint32_t owner_weight = cuda::owner_weight(quad);
  cuda::PackedSumsCheck check;
  int stage = 0;
  uint32_t parity = 0, q_parity = 0;
  uint32_t words = warp, words_parity = 0;
  const auto load_q = [&](int t) {
    if (thread != 0 || t >= a.queries) return;
    cuda::mbarrier_arrive_expect(&s.q_full, sizeof s.q);
    for (int p = 0; p < 2; ++p) cuda::tma_load_3d(s.q + p * kPanelBytes, map_q, &s.q_full, p * 64, 0, t);
  };
  load_q(blockIdx.x);
  int next_length = a.length(blockIdx.x);
  for (int t = blockIdx.x; t < a.queries; t += gridDim.x) {
    const int length = next_length;
    next_length = a.length(t + gridDim.x);
    float w[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) w[h] = row + 8 * h < a.heads ? __ldg(a.w + t * a.w_stride + row + 8 * h) : 0.f;
    const char* const q = s.q;
    cuda::mbarrier_wait(&s.q_full, q_parity);
    q_parity ^= 1;

    float dq[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) dq[i] = 0;
    for (int left = tiles_of(length); left > 0; --left) {
      cuda::mbarrier_wait(&s.full[stage], parity);
      cuda::fence_async_proxy();
      float x[32];
      cuda::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; ++i)
        cuda::wgmma_bf16_n64<false, false, -1>(
            x, cuda::operand_along_k(q + i / 4 * kPanelBytes) + 2 * (i % 4),
            cuda::operand_along_k(s.keys[stage] + i / 4 * kPanelBytes) + 2 * (i % 4), i > 0);
      cuda::wgmma_commit();
      const int own_key = s.key[stage][lane % 4 * 16 + warp * 4 + lane % 16 / 4];
      const uint32_t own_weight = own_key >= 0 ? cuda::row_weight(own_key) : 0;
      const uint32_t weight[2] = {__shfl_sync(~0u, own_weight, lane / 4), __shfl_sync(~0u, own_weight, lane / 4 + 8)};
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(x);
      uint32_t high[4][4], rest[4][4], g[8][2];
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        const uint2 d = s.d[stage][4 * b + quad];
        const float d0 = low_half(d.x) + low_half(d.y), d1 = high_half(d.x) + high_half(d.y);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t positive = signs(x[4 * b + 2 * h], x[4 * b + 2 * h + 1]);
          high[b / 2][b % 2 * 2 + h] = d.x & positive;
          rest[b / 2][b % 2 * 2 + h] = d.y & positive;
          g[b][h] = pack(d0 * w[h], d1 * w[h]) & positive;
        }
      }
      cuda::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint64_t keys = cuda::operand_across_k(s.keys[stage], kPanelBytes) + 128 * j;
        cuda::wgmma_bf16_n128<true>(dq, high[j], keys);
        cuda::wgmma_bf16_n128<true>(dq, rest[j], keys);
      }
      cuda::wgmma_commit();
      // All warps have multiplied the gradient before.
      cuda::mbarrier_wait(&s.free[stage == 0 ? kStages - 1 : stage - 1], parity ^ (stage == 0));
      const uint32_t to_gradient = cuda::keep(gradient);
#pragma unroll
      for (int b = 0; b < 8; b += 2)
        cuda::store_matrices(to_gradient ^ b << 4, g[b][0], g[b][1], g[b + 1][0], g[b + 1][1]);
      cuda::fence_async_proxy();
      sync_computing();
      float dk[64];
      cuda::wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j)
        cuda::wgmma_bf16_n128<true, true>(dk, cuda::operand_across_k(s.gradient) + 128 * j,
                                          cuda::operand_across_k(q, kPanelBytes) + 128 * j, j > 0);
      cuda::wgmma_commit();
      cuda::wgmma_wait<0>();
      cuda::wgmma_settle(dk);
      cuda::wgmma_settle(dq);
      cuda::mbarrier_arrive(&s.free[stage]);
      if (++stage == kStages) stage = 0, parity ^= 1;

      cuda::mbarrier_wait(&s.words_free[words], words_parity ^ 1);
      const uint32_t own_words = cuda::shared_address(s.words[words]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t to = own_words + (lane / 4 + 8 * h) * kRowBytes + quad * 8;
        cuda::PackedSumsCheck::Row sums;
#pragma unroll
        for (int n = 0; n < kWordsEach; ++n) {
          const auto column = [&](int i) { return dk[4 * (i / 2) + 2 * h + i % 2]; };
          const uint32_t raw0 = quanta.raw(column(3 * n)), raw1 = quanta.raw_upper(column(3 * n + 1));
          const uint32_t raw2 = 3 * n + 2 < 32 ? quanta.raw_upper(column(3 * n + 2)) : quanta.upper_zero;
          sums.add(raw0, cuda::column_weight(3 * n), quanta);
          sums.add_upper(raw1, cuda::column_weight(3 * n + 1), quanta);
          if (3 * n + 2 < 32) sums.add_upper(raw2, cuda::column_weight(3 * n + 2), quanta);
          asm volatile("st.shared.b64 [%0], %1;" ::"r"(to + n * 32), "l"(quanta.word(raw0, raw1, raw2)) : "memory");
        }
        check.add(sums, weight[h] * owner_weight, quanta);
      }
      cuda::fence_async_proxy();
      __syncwarp();
      if (lane < 16) s.word_key[words][lane] = own_key;
      cuda::mbarrier_arrive(&s.words_full[words]);
      next_words(words, words_parity);
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = row + 8 * h;
      float dw = 0;
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        const uint32_t two =
            *reinterpret_cast<const uint32_t*>(q + b / 8 * kPanelBytes + j * 128 + (((b ^ j) & 7) << 4) + 4 * quad);
        dw = fmaf(low_half(two), dq[4 * b + 2 * h], dw);
        dw = fmaf(high_half(two), dq[4 * b + 2 * h + 1], dw);
      }
      dw += __shfl_xor_sync(~0u, dw, 1);
      dw += __shfl_xor_sync(~0u, dw, 2);
      if (j >= a.heads) continue;
      const int64_t at = t * a.heads + j;
      if (quad == 0) a.dw[at] = dw;
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        const int64_t place = at * kDim + 8 * b + 2 * quad;
        const float x = w[h] * dq[4 * b + 2 * h], y = w[h] * dq[4 * b + 2 * h + 1];
        if (a.dq_bf16) __stcs(reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(a.dq) + place), pack(x, y));
        else *reinterpret_cast<float2*>(static_cast<float*>(a.dq) + place) = make_float2(x, y);
      }
    }
    sync_computing();  // q is read
    load_q(t + gridDim.x);
  }
  check.leave(a.head);
}

__host__ __device__ bool large(int64_t keys) { return keys * Layout::kRowWords * 8 > kPaceBytes; }

// Pace is worth keeping where rows that run together list different keys and these are many. Pairs of rows, 128 threads
// each; keys are compared by 15 bits of them. A list's halves differ if one has less than a quarter of its range.
constexpr int kSamples = 8;
__global__ void __launch_bounds__(128 * kSamples) make_plan(const Arguments a, Plan* plan) {
  constexpr int kBits = 1 << 15;
  __shared__ uint32_t listed[kSamples][kBits / 32];
  __shared__ int listed_twice, compared, dense_halves;
  __shared__ uint32_t least, most;
  const int thread = threadIdx.x % 128, sample = threadIdx.x / 128;
  for (int i = thread; i < kBits / 32; i += 128) listed[sample][i] = 0;
  if (threadIdx.x == 0) listed_twice = compared = dense_halves = 0, least = ~0u, most = 0;
  __syncthreads();
  const int64_t one = (2 * sample + 1) * int64_t{a.queries} / (2 * kSamples);
  const int64_t other = min(one + 64, int64_t{a.queries} - 1);
  const int one_length = a.length(one), other_length = a.length(other);
  for (int i = thread; i < one_length; i += 128) {
    const uint32_t key = a.indices[one * a.indices_stride + i];
    atomicOr(&listed[sample][key % kBits / 32], 1u << key % 32);
  }
  __syncthreads();
  int twice = 0;
  uint32_t first = ~0u, last = 0;
  const int32_t* const list = a.indices + other * a.indices_stride;
  for (int i = thread; i < other_length; i += 128) {
    const uint32_t key = list[i];
    twice += listed[sample][key % kBits / 32] >> key % 32 & 1;
    if (key < static_cast<uint32_t>(a.keys)) first = min(first, key), last = max(last, key);
  }
  atomicAdd(&listed_twice, twice), atomicMin(&least, first), atomicMax(&most, last);
  if (thread == 0) atomicAdd(&compared, other_length);
  if (thread == 0 && other_length > 2) {
    const int64_t low = list[0], middle = list[other_length / 2], high = list[other_length - 1];
    if (4 * min(middle - low, high - middle) < high - low) atomicAdd(&dense_halves, 1);
  }
  __syncthreads();
  if (threadIdx.x < cuda::Pace::kCounters) plan->pace[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    const bool paced = 5 * listed_twice < 2 * compared && most > least && large(most - least);
    plan->path = !paced ? Path::AROUND : 2 * dense_halves > kSamples ? Path::BOTH_HALVES : Path::UP_AND_DOWN;
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    sparse_loss(const __grid_constant__ CUtensorMap map_q, const Arguments a) {
  extern __shared__ __align__(1024) char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      cuda::mbarrier_init(&s.full[i], 2 * 64);
      cuda::mbarrier_init(&s.free[i], 128);
    }
    for (int i = 0; i < kWordTiles; ++i) {
      cuda::mbarrier_init(&s.words_full[i], 32);
      cuda::mbarrier_init(&s.words_free[i], 32);
    }
    cuda::mbarrier_init(&s.q_full, 1);
    cuda::mbarrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 1) {
    cuda::fewer_registers<64>();
    if (__shfl_sync(~0u, threadIdx.x / 64, 0) == 2) gather_tiles(a, s);
    else add_words(a, s);
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
  if (!p.scores) return no("the scores of the listed keys are missing");
  if (p.q_stride % 8 || p.k_stride % 8) return no("a stride of q or k is not a multiple of 8");
  if (!aligned(p.q) || !aligned(p.key) || !aligned(p.dq) || !aligned(p.workspace))
    return no("q, k, dq or the workspace is not 16-byte aligned");
  if (reinterpret_cast<uintptr_t>(p.dk_sum) % 128) return no("dk_sum is not 128-byte aligned");
  int exponent;
  if (!(p.quantum > 0) || std::frexp(p.quantum, &exponent) != 0.5f) return no("the quantum is no power of two");
  return true;
}

size_t indexer_kl_sparse_workspace_bytes() { return sizeof(indexer_kl_sparse_sm90::Plan); }
int64_t indexer_kl_sparse_sum_bytes(int64_t keys) {
  return cuda::packed_sums_bytes<indexer_kl_sparse_sm90::Layout>(keys);
}

void launch_indexer_kl_sparse_sm90(const IndexerKlSparseParams& p) {
  using namespace indexer_kl_sparse_sm90;
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot run indexer_kl over selected keys for Hopper (") + why +
                             ") choose another implementation");
  if (p.workspace_bytes < indexer_kl_sparse_workspace_bytes())
    throw std::runtime_error("cannot run indexer_kl over selected keys (the workspace of " +
                             std::to_string(p.workspace_bytes) +
                             " bytes is too small) give indexer_kl_sparse_workspace_bytes()");
  if (p.queries == 0) return;
  const CUtensorMap map_q =
      cuda::make_tensor_map(p.q, {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                  3,
                                  {kDim, uint64_t(p.heads), uint64_t(p.queries)},
                                  {kDim * 2, uint64_t(p.q_stride) * 2},
                                  {64, kHeads, 1}});
  Arguments a{};
  a.queries = static_cast<int>(p.queries), a.keys = static_cast<int>(p.keys), a.heads = p.heads, a.k = p.k;
  a.key = static_cast<const char*>(p.key), a.key_bytes = p.k_stride * 2;
  a.w = p.w, a.w_stride = p.w_stride;
  a.indices = p.indices, a.indices_stride = p.indices_stride, a.lengths = p.lengths;
  a.score = p.scores, a.score_stride = p.scores_stride;
  a.p = p.p_sel, a.p_stride = p.p_stride;
  a.loss_scale = p.loss_scale, a.row_weight = p.row_weight;
  a.kl = p.kl, a.entropy_target = p.entropy_target, a.entropy_prediction = p.entropy_prediction;
  a.dq = p.dq, a.dq_bf16 = p.dq_bf16, a.dw = p.dw;
  a.head = cuda::packed_sums_head(p.dk_sum), a.dk_sum = cuda::packed_sums_rows(p.dk_sum);
  a.magic = cuda::magic_of(p.quantum);
  if (large(p.keys)) {
    auto* const plan = static_cast<Plan*>(p.workspace);
    make_plan<<<1, 128 * kSamples, 0, p.stream>>>(a, plan);
    cuda::check(cudaGetLastError(), "launch the plan of indexer_kl");
    a.plan = plan;
  }
  constexpr int kBytes = sizeof(Shared);
  static_assert(kBytes <= 113 * 1024);
  cuda::check(cudaFuncSetAttribute(sparse_loss, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
              "reserve shared memory for indexer_kl");
  // CTAs that may keep pace have as many rows each.
  const int64_t most = cuda::multiprocessors() * 2, rounds = (p.queries + most - 1) / most;
  const auto blocks = static_cast<unsigned>(a.plan ? (p.queries + rounds - 1) / rounds : std::min(p.queries, most));
  sparse_loss<<<blocks, kThreads, kBytes, p.stream>>>(map_q, a);
  cuda::check(cudaGetLastError(), "launch indexer_kl over selected keys");
}

void launch_indexer_kl_sparse_finish_sm90(const uint64_t* dk_sum, int64_t keys, float quantum, void* dk, bool bf16,
                                          QuantumReport* report, cudaStream_t stream) {
  cuda::launch_finish_packed_sums<indexer_kl_sparse_sm90::Layout>(dk_sum, keys, quantum, dk, bf16, report, stream);
}

}  // namespace dsa
