// Unions of lists for CTAs that take several of them at a time: their keys, ascending, and for each key its place in
// each list. Two lists are united where the union has at most 3/4 of their entries (and no list has a key twice).
//
// A key's place in the union is the number of listed keys below it: each list sets bits in a map of the keys, a window
// of them at a time, and the bits before a key's are counted.
#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/sparse_mla/sm90_backward.h"
#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kMapBytes = 96 * 1024, kStretchBytes = 96 * 1024;  // in shared memory: of keys, of the union

struct Arguments {
  Lists lists;
  int64_t first, count;  // lists
  int words, stretch;    // of a window; entries of the union at a time
  Union out;
  bool choose;           // whether to unite
  const int32_t* named;  // choose: not where the lists name more than cached_keys; null: they do not
  int cached_keys;
};

__global__ void __launch_bounds__(kThreads, 1) unite(const Arguments a) {
  extern __shared__ uint32_t memory[];
  if (a.named && __ldg(a.named) > a.cached_keys) return;
  const int group = a.out.group, capacity = group * a.lists.k;
  uint32_t* const bits = memory;                                       // [group][words], of the lists
  uint32_t* const all = memory + group * a.words;                      // [words]
  int* const before = reinterpret_cast<int*>(all + a.words);           // [words], listed keys before a word's
  int* const keys = before + a.words;                                  // [stretch]
  auto* const places = reinterpret_cast<uint32_t*>(keys + a.stretch);  // [stretch][group / 2], two in a word
  __shared__ int warp_sums[kWarps], lengths[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int32_t* const to_keys = a.out.keys + int64_t{blockIdx.x} * capacity;
  auto* const to_places = reinterpret_cast<uint32_t*>(a.out.places + int64_t{blockIdx.x} * capacity * group);

  const int share = kWarps / group, own = warp / share;  // several warps a list
  const int64_t index = int64_t{blockIdx.x} * group + own, list = a.first + index;
  const int length = index < a.count ? a.lists.length(list) : 0;
  const int32_t* const row = a.lists.indices + list * a.lists.stride;
  const uint32_t window_keys = 32 * a.words;
  const auto for_own = [&](uint32_t window, auto&& visit) {  // entries that count and are in the window
    constexpr int kAtOnce = 4;
    for (int from = warp % share * 32 + lane; from < length; from += kAtOnce * share * 32) {
      int entry[kAtOnce], last[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = from + j * share * 32;
        entry[j] = i < length ? __ldg(row + i) : -1;
        last[j] = i > 0 && i < length ? __ldg(row + i - 1) : -1;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int key = a.lists.counting(entry[j], last[j]);
        const uint32_t bit = key - window;
        if (key >= 0 && bit < window_keys) visit(from + j * share * 32, key, bit);
      }
    }
  };

  int total = 0;
  bool twice = false;  // a list has a key again
  for (uint32_t window = 0; window < static_cast<uint32_t>(a.lists.keys); window += window_keys) {
    for (int i = threadIdx.x; i < group * a.words; i += kThreads) bits[i] = 0;
    __syncthreads();
    for_own(window, [&](int, int, uint32_t bit) {
      const uint32_t had = atomicOr(bits + own * a.words + bit / 32, 1u << bit % 32);
      twice |= had >> bit % 32 & 1;
    });
    __syncthreads();
    const int each = (a.words + kThreads - 1) / kThreads, begin = min(threadIdx.x * each, a.words),
              end = min(begin + each, a.words);
    int count = 0;
    for (int w = begin; w < end; ++w) {
      uint32_t any = 0;
      for (int g = 0; g < group; ++g) any |= bits[g * a.words + w];
      all[w] = any;
      count += __popc(any);
    }
    int inclusive = count;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, inclusive, d);
      if (lane >= d) inclusive += other;
    }
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    const int sum = warp_sums[lane], first = total;
    int at = total + inclusive - count + __reduce_add_sync(~0u, lane < warp ? sum : 0);
    total += __reduce_add_sync(~0u, sum);
    for (int w = begin; w < end; ++w) before[w] = at, at += __popc(all[w]);
    for (int from = first; from < total; from += a.stretch) {
      const int n = min(a.stretch, total - from);
      for (int i = threadIdx.x; i < n * group / 2; i += kThreads) places[i] = ~0u;
      __syncthreads();
      for_own(window, [&](uint32_t i, int key, uint32_t bit) {
        const int to = before[bit / 32] + __popc(all[bit / 32] & ((1u << bit % 32) - 1)) - from;
        if (static_cast<uint32_t>(to) >= static_cast<uint32_t>(n)) return;
        keys[to] = key;
        // Two entries that name the key again meet here: what is left does not depend on their order.
        atomicAnd(places + (to * group + own) / 2, own % 2 ? i << 16 | 0xFFFF : i | 0xFFFF0000);
      });
      __syncthreads();
      for (int i = threadIdx.x; i < n; i += kThreads) to_keys[from + i] = keys[i];
      for (int i = threadIdx.x; i < n * group / 2; i += kThreads) to_places[from * group / 2 + i] = places[i];
      __syncthreads();
    }
  }
  const int padded = tiles_of(total) * kTile;
  for (int i = total + threadIdx.x; i < padded; i += kThreads) to_keys[i] = -1;
  for (int i = total * group / 2 + threadIdx.x; i < padded * group / 2; i += kThreads) to_places[i] = ~0u;
  if (lane == 0) lengths[warp] = warp % share ? 0 : length;
  twice = __syncthreads_or(twice);
  const int entries = __reduce_add_sync(~0u, lengths[lane]);
  const bool united = !a.choose || (!twice && 4 * total <= 3 * entries);
  if (threadIdx.x == 0) a.out.lengths[blockIdx.x] = united ? total : 0;
}

void launch(Arguments a, cudaStream_t stream) {
  a.words = std::min(kMapBytes / (4 * (a.out.group + 2)), (a.lists.keys + 31) / 32);
  a.stretch = std::min(a.out.group * a.out.k, kStretchBytes / (4 + 2 * a.out.group));
  const int bytes = ((a.out.group + 2) * a.words + a.stretch) * 4 + a.stretch * a.out.group * 2;
  cuda::check(cudaFuncSetAttribute(unite, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
              "reserve shared memory for sparse_mla backward");
  unite<<<static_cast<int>((a.count + a.out.group - 1) / a.out.group), kThreads, bytes, stream>>>(a);
  cuda::check(cudaGetLastError(), "launch the union of lists of sparse_mla backward");
}

}  // namespace

void launch_unite(const SparseMlaBackwardParams& p, const Chunk& chunk, cudaStream_t stream) {
  launch({own_lists(p), chunk.first_row, chunk.rows, 0, 0, chunk.lists, false, nullptr, 0}, stream);
}

void launch_pair(const SparseMlaBackwardParams& p, const Chunk& chunk, cudaStream_t stream) {
  launch({lists_of(p, chunk), first_list(chunk), groups_of(chunk), 0, 0, chunk.pairs, true, chunk.mentions.named,
          p.cached_keys},
         stream);
}

}  // namespace dsa::sparse_mla_sm90
