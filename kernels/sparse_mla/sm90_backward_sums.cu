// dkv by key, for tables that the caches do not hold: what every list leaves to its keys lies as bf16 rows in the
// workspace (sm90_backward_keys.cu), and here every key fetches its rows and adds them up.
//
//   dkv_sum[s] += sum over the lists g of a chunk that name s of rows[g][place of s in g]
//
// Contributions added to a table in memory at once read and write every line of it several times a chunk; a row is
// written once and read once. A chunk's sums of a key leave as words of three (packed_sums.cuh). Where the lists of the
// last 1024 queries name few keys, their sums stay in the caches and nothing is left to do here.
// Which lists name a key: for every 32 keys (a word) and every list, the keys it names as bits and the place of the
// first. Lists whose entries do not all count before the last that does (the contract allows any) are searched instead.
#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/cuda/packed_sums.cuh"
#include "kernels/sparse_mla/sm90_backward.h"
#include "kernels/sparse_mla/sm90_sum_layout.cuh"

namespace dsa::sparse_mla_sm90 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kNamingQueries = 1024;

struct Arguments {
  Lists lists;
  int64_t first_list;
  int groups, stride;  // lists of the chunk; of a word in bits and places
  Mentions mentions;
  const __nv_bfloat16* rows;  // [groups][lists.k][576]
  cuda::PackedSumsHead* head;
  uint64_t* table;
  float magic;
  int cached_keys;
};

// One CTA a row of indices.
__global__ void __launch_bounds__(kThreads) mark_keys(const Lists lists, int64_t first, uint32_t* marks) {
  const int64_t t = first + blockIdx.x;
  const int32_t* const row = lists.indices + t * lists.stride;
  const int length = lists.length(t);
  for (int i = threadIdx.x; i < length; i += kThreads) {
    const int key = lists.counting(__ldg(row + i), i > 0 ? __ldg(row + i - 1) : -1);
    if (key >= 0 && !(__ldcg(marks + key / 32) >> key % 32 & 1)) atomicOr(marks + key / 32, 1u << key % 32);
  }
}

__global__ void __launch_bounds__(kThreads) count_marks(const uint32_t* marks, int64_t words, int32_t* named) {
  const int64_t word = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int count = __reduce_add_sync(~0u, word < words ? __popc(marks[word]) : 0);
  if (threadIdx.x % 32 == 0 && count) atomicAdd(named, count);
}

// One CTA a list.
__global__ void __launch_bounds__(kThreads) find_mentions(const Arguments a) {
  if (__ldg(a.mentions.named) <= a.cached_keys) return;
  const int64_t list = a.first_list + blockIdx.x;
  const int32_t* const row = a.lists.indices + list * a.lists.stride;
  const int length = a.lists.length(list);
  const auto counting = [&](int i) { return a.lists.counting(__ldg(row + i), i > 0 ? __ldg(row + i - 1) : -1); };
  bool gap = false;
  for (int i = threadIdx.x + 1; i < length; i += kThreads) gap |= counting(i) >= 0 && counting(i - 1) < 0;
  const bool searched = __syncthreads_or(gap);
  if (threadIdx.x == 0) a.mentions.searched[blockIdx.x] = searched;
  for (int i = threadIdx.x; i < length; i += kThreads) {
    const int key = counting(i), word = key / 32;
    if (key < 0) continue;
    uint32_t* const bits = a.mentions.bits + int64_t{word} * a.stride + blockIdx.x;
    if (searched) {
      atomicOr(bits, 1u << key % 32);
      continue;
    }
    if (i > 0 && __ldg(row + i - 1) / 32 == word) continue;  // not the first of its word
    uint32_t mask = 1u << key % 32;
    for (int j = i + 1; j < length; ++j) {
      const int next = counting(j);
      if (next < 0 || next / 32 != word) break;
      mask |= 1u << next % 32;
    }
    *bits = mask;
    a.mentions.places[int64_t{word} * a.stride + blockIdx.x] = static_cast<uint16_t>(i);
  }
}

// Half of an owner's columns of a key (sm90_sum_layout.cuh): lane 8 part + 4 half + q has the 18 from 18 half on. A row
// brings the first 8 at 8 * lane, 8 more at 256 + 8 * lane, 2 at 512 + 2 * lane.
struct Row {
  uint4 pairs[2];
  uint32_t last;

  __device__ __forceinline__ void load(const __nv_bfloat16* row, int lane) {
    pairs[0] = __ldcs(reinterpret_cast<const uint4*>(row) + lane);
    pairs[1] = __ldcs(reinterpret_cast<const uint4*>(row) + 32 + lane);
    last = __ldcs(reinterpret_cast<const uint32_t*>(row) + 256 + lane);
  }
};

struct Sums {
  float v[18] = {};
  float greatest = 0;  // of the sums after every few rows

  __device__ __forceinline__ void add(const Row& r) {
    const uint32_t pairs[9] = {r.pairs[0].x, r.pairs[0].y, r.pairs[0].z, r.pairs[0].w, r.pairs[1].x,
                               r.pairs[1].y, r.pairs[1].z, r.pairs[1].w, r.last};
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      v[2 * i] += __uint_as_float(pairs[i] << 16);
      v[2 * i + 1] += __uint_as_float(pairs[i] & 0xFFFF0000u);
    }
  }
  __device__ __forceinline__ void note() {
#pragma unroll
    for (float x : v) greatest = fmaxf(greatest, fabsf(x));
  }

  // fp32 has 2^24 quanta: no sum is inexact if none passes 2^22 whenever it is noted, every four rows or oftener.
  __device__ __forceinline__ void add_to(uint64_t* table, int key, int lane, const cuda::Quanta& quanta,
                                         cuda::PackedSumsCheck& check) const {
    const int part = lane / 8, half = lane % 8 / 4, q = lane % 4;
    uint64_t* const to = table + int64_t{key} * SumLayout::kRowWords + part * SumLayout::kPartWords + half * 24 + q;
    cuda::PackedSumsCheck::Row row;
#pragma unroll
    for (int j = 0; j < 6; ++j) {
      uint32_t raw[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const int n = 3 * j + i;
        raw[i] = quanta.raw(v[n]);
        row.add(raw[i], half ? cuda::column_weight(18 + n) : cuda::column_weight(n), quanta);
      }
      cuda::add_word(to + 4 * j, quanta.word(raw[0], raw[1], raw[2]));
    }
    check.add(row, cuda::row_weight(key) * cuda::owner_weight(part * 4 + q), quanta);
    if (greatest >= quanta.magic / 3) check.add_out_of_range();
  }
};

// One CTA a word of 32 keys, one warp four of them. A key's rows are added in the order of the lists.
__global__ void __launch_bounds__(kThreads, 4) sum_mentions(const Arguments a) {
  extern __shared__ __align__(16) char memory[];
  if (__ldg(a.mentions.named) <= a.cached_keys) return;
  auto* const bits = reinterpret_cast<uint32_t*>(memory);                            // [groups]
  auto* const found = bits + a.groups + threadIdx.x / 32 * a.groups;  // [groups], of the warp: list, place
  auto* const places = reinterpret_cast<uint16_t*>(bits + (1 + kWarps) * a.groups);  // [groups]
  const int64_t word = blockIdx.x;
  const int lane = threadIdx.x % 32;
  uint32_t any = 0;
  for (int g = threadIdx.x; g < a.groups; g += kThreads) {
    bits[g] = a.mentions.bits[word * a.stride + g];
    places[g] = a.mentions.places[word * a.stride + g];
    any |= bits[g];
    if (bits[g]) a.mentions.bits[word * a.stride + g] = 0;
  }
  if (!__syncthreads_or(any)) return;
  const cuda::Quanta quanta(a.magic);
  cuda::PackedSumsCheck check;
  const auto row = [&](int list, int place) { return a.rows + (int64_t{list} * a.lists.k + place) * kDim; };
  for (int bit = threadIdx.x / 32; bit < 32; bit += kWarps) {
    const int key = static_cast<int>(word) * 32 + bit;
    int count = 0;
    bool some_searched = false;
    for (int first = 0; first < a.groups; first += 32) {
      const int g = first + lane;
      const uint32_t named = g < a.groups ? bits[g] : 0;
      const bool has = named >> bit & 1;
      const uint32_t all = __ballot_sync(~0u, has);
      const bool searched = has && a.mentions.searched[g];
      some_searched |= __any_sync(~0u, searched);
      if (has) found[count + __popc(all & ((1u << lane) - 1))] =
          g << 16 | (searched ? kNowhere : places[g] + __popc(named & ((1u << bit) - 1)));
      count += __popc(all);
    }
    __syncwarp();
    if (count == 0) continue;
    Sums sums;
    int i = 0;
    constexpr int kAtOnce = 4;
    if (!some_searched) {
      for (; i + kAtOnce <= count; i += kAtOnce) {
        Row r[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) r[j].load(row(found[i + j] >> 16, found[i + j] & 0xFFFF), lane);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) sums.add(r[j]);
        sums.note();
      }
    }
    for (; i < count; ++i) {
      const int list = found[i] >> 16, place = found[i] & 0xFFFF;
      Row r;
      if (place != kNowhere) {
        r.load(row(list, place), lane);
        sums.add(r);
        sums.note();
        continue;
      }
      const int64_t of = a.first_list + list;
      const int32_t* const entries = a.lists.indices + of * a.lists.stride;
      const int length = a.lists.length(of);
      for (int first = 0; first < length; first += 32) {
        const int e = first + lane;
        const bool here =
            e < length && __ldg(entries + e) == key && a.lists.counting(key, e > 0 ? __ldg(entries + e - 1) : -1) >= 0;
        for (uint32_t hits = __ballot_sync(~0u, here); hits; hits &= hits - 1) {
          r.load(row(list, first + __ffs(static_cast<int>(hits)) - 1), lane);
          sums.add(r);
          sums.note();
        }
      }
    }
    sums.add_to(a.table, key, lane, quanta, check);
    __syncwarp();  // found is free
  }
  check.leave(a.head);
}

Arguments arguments(const SparseMlaBackwardParams& p, const Chunk& chunk) {
  return {lists_of(p, chunk), first_list(chunk), static_cast<int>(groups_of(chunk)), chunk.mentions.stride,
          chunk.mentions, static_cast<const __nv_bfloat16*>(chunk.contributions), cuda::packed_sums_head(p.dkv_sum),
          cuda::packed_sums_rows(p.dkv_sum), cuda::magic_of(p.quantum), p.cached_keys};
}

int64_t words_of(const SparseMlaParams& p) { return (p.keys + 31) / 32; }

}  // namespace

void launch_count_named(const SparseMlaBackwardParams& p, const Mentions& out) {
  const int64_t words = words_of(p);
  if (out.bits)
    cuda::check(cudaMemsetAsync(out.bits, 0, sizeof(uint32_t) * words * out.stride, p.stream),
                "clear the mentions of keys");
  cuda::check(cudaMemsetAsync(out.marks, 0, sizeof(uint32_t) * words, p.stream), "clear the marks of keys");
  cuda::check(cudaMemsetAsync(out.named, 0, sizeof(int32_t), p.stream), "clear the count of keys");
  const int64_t sample = std::min<int64_t>(p.queries, kNamingQueries);
  mark_keys<<<static_cast<unsigned>(sample), kThreads, 0, p.stream>>>(
      own_lists(p), p.queries - sample, out.marks);
  cuda::check(cudaGetLastError(), "launch the marks of sparse_mla backward");
  count_marks<<<static_cast<unsigned>((words + kThreads - 1) / kThreads), kThreads, 0, p.stream>>>(out.marks, words,
                                                                                                   out.named);
  cuda::check(cudaGetLastError(), "launch the count of keys of sparse_mla backward");
}

void launch_mentions(const SparseMlaBackwardParams& p, const Chunk& chunk, cudaStream_t stream) {
  const Arguments a = arguments(p, chunk);
  find_mentions<<<a.groups, kThreads, 0, stream>>>(a);
  cuda::check(cudaGetLastError(), "launch the mentions of sparse_mla backward");
}

void launch_sums(const SparseMlaBackwardParams& p, const Chunk& chunk, cudaStream_t stream) {
  const Arguments a = arguments(p, chunk);
  const int bytes = a.groups * (4 * (1 + kWarps) + 2);
  cuda::check(cudaFuncSetAttribute(sum_mentions, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
              "reserve shared memory for sparse_mla backward");
  sum_mentions<<<static_cast<unsigned>(words_of(p)), kThreads, bytes, stream>>>(a);
  cuda::check(cudaGetLastError(), "launch the sums of sparse_mla backward");
}

}  // namespace dsa::sparse_mla_sm90
