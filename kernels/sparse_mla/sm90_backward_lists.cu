// One list for the few queries that share a CTA when a query has 32 heads or fewer: the union of their keys, ascending,
// and for each key its place in each query's own list.
//
// A key's place in the union is the number of distinct keys below it. Merged in order of keys, with what is equal side
// by side, the first of equals lies at the sum over the lists of the entries below it: a bit is set there, and the bits
// before it are counted.
#include "kernels/cuda/check.h"
#include "kernels/sparse_mla/sm90_backward.h"
#include "kernels/sparse_mla/sm90_tile.cuh"

namespace dsa::sparse_mla_sm90 {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kMostGroup = 8;

struct Arguments {
  Lists lists;
  int64_t first_row, rows;
  Union out;
};

// Entries of a sorted list below x.
__device__ __forceinline__ int below(const int* list, int n, int x) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads, 1) unite(const Arguments a) {
  extern __shared__ __align__(16) char memory[];
  const int queries = a.out.group, capacity = queries * a.lists.k, words = capacity / 32;
  int* const keys = reinterpret_cast<int*>(memory);                       // [queries][K], those that count
  auto* const places = reinterpret_cast<uint16_t*>(keys + capacity);      // [queries][K], where they were
  auto* const bits = reinterpret_cast<uint32_t*>(places + capacity);      // of the merged order
  int* const before = reinterpret_cast<int*>(bits + words);               // bits set before a word
  __shared__ int counts[kMostGroup], parts[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = a.first_row + int64_t{blockIdx.x} * queries;
  auto* const to_keys = a.out.keys + int64_t{blockIdx.x} * capacity;
  auto* const to_places = a.out.places + int64_t{blockIdx.x} * capacity * queries;
  for (int i = threadIdx.x; i < words; i += kThreads) bits[i] = 0;
  for (int i = threadIdx.x; i < capacity * queries / 2; i += kThreads) reinterpret_cast<uint32_t*>(to_places)[i] = ~0u;

  // Several warps a query, each a stretch of its list: they count, then write behind one another.
  const int share = kWarps / queries, own = warp / share, stretch = (a.lists.k / 32 + share - 1) / share * 32;
  const int64_t t = first + own;
  const int length = t < a.first_row + a.rows ? a.lists.length(t) : 0;
  const int begin = min(warp % share * stretch, length), end = min(begin + stretch, length);
  const int32_t* const row = a.lists.indices + t * a.lists.stride;
  const auto counting = [&](int i) {
    return i < end ? a.lists.counting(__ldg(row + i), i > 0 ? __ldg(row + i - 1) : -1) : -1;
  };
  int count = 0;
  for (int i = begin; i < end; i += 32) count += __popc(__ballot_sync(~0u, counting(i + lane) >= 0));
  if (lane == 0) parts[warp] = count;
  __syncthreads();
  int at = 0;
  for (int w = warp / share * share; w < warp; ++w) at += parts[w];
  if (lane == 0 && warp % share == share - 1) counts[own] = at + count;
  for (int i = begin; i < end; i += 32) {
    const int key = counting(i + lane);
    const uint32_t counted = __ballot_sync(~0u, key >= 0);
    const int to = own * a.lists.k + at + __popc(counted & ((1u << lane) - 1));
    if (key >= 0) keys[to] = key, places[to] = static_cast<uint16_t>(i + lane);
    at += __popc(counted);
  }
  __syncthreads();

  const auto merged = [&](int of, int i) {
    const int key = keys[of * a.lists.k + i];
    int sum = i;
    for (int g = 0; g < queries; ++g)
      if (g != of) sum += below(keys + g * a.lists.k, counts[g], key);
    return sum;
  };
  for (int e = threadIdx.x; e < capacity; e += kThreads) {
    const int of = e / a.lists.k, i = e % a.lists.k;
    if (i >= counts[of]) continue;
    const int m = merged(of, i);
    atomicOr(bits + m / 32, 1u << m % 32);
  }
  __syncthreads();
  if (warp == 0) {
    int sum = 0;
    for (int i = 0; i < words; i += 32) {
      const int n = i + lane < words ? __popc(bits[i + lane]) : 0;
      int inclusive = n;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, inclusive, d);
        if (lane >= d) inclusive += other;
      }
      if (i + lane < words) before[i + lane] = sum + inclusive - n;
      sum += __shfl_sync(~0u, inclusive, 31);
    }
    if (lane == 0) a.out.lengths[blockIdx.x] = sum;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < capacity; e += kThreads) {
    const int of = e / a.lists.k, i = e % a.lists.k;
    if (i >= counts[of]) continue;
    const int m = merged(of, i), to = before[m / 32] + __popc(bits[m / 32] & ((1u << m % 32) - 1));
    to_keys[to] = keys[e];
    to_places[to * queries + of] = places[e];
  }
}

}  // namespace

void launch_unite(const SparseMlaBackwardParams& p, const Chunk& chunk) {
  const Union& out = chunk.lists;
  const int capacity = out.group * p.k, bytes = capacity * 6 + capacity / 32 * 8;
  const Arguments a{
      {p.indices, p.indices_stride, p.lengths, p.k, static_cast<int>(p.keys)}, chunk.first_row, chunk.rows, out};
  cuda::check(cudaFuncSetAttribute(unite, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
              "reserve shared memory for sparse_mla backward");
  unite<<<static_cast<int>((chunk.rows + out.group - 1) / out.group), kThreads, bytes, p.stream>>>(a);
  cuda::check(cudaGetLastError(), "launch the union of lists of sparse_mla backward");
}

}  // namespace dsa::sparse_mla_sm90
