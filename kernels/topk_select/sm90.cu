// Exact selection of the k best scores of each row; see params.h for the order.
//
// One block of threads takes one row (a warp does where rows are narrow: sm90_narrow.cu). A row of at most kResident
// scores stays in registers. A longer one is read once, in order: scores above a threshold go to a buffer in shared
// memory, and whenever the buffer is full it is cut to its k best, which raises the threshold. What is dropped is never
// among the k best: at least k scores above it, or equal to it and earlier, are in the buffer (equals are kept by index).
// A sample of the row gives the first threshold; if that turns out to lie above the k-th best score, the row is read
// again without it. Nothing can overflow or truncate.
//
// A cut finds the k-th best score by a histogram over equal steps of the scores' own range, then over steps of their
// bit patterns within the bin where the k-th lies (at most three times, whatever the values), until the bin is small
// enough to rank each of its scores against the others, or holds one value, of which the lowest indices are found in
// the same way. The selected indices pass through a bitmap, which puts them in order.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/topk_select/params.h"
#include "kernels/topk_select/sm90_key.cuh"
#include "kernels/topk_select/sm90_narrow.h"

namespace dsa {
namespace topk_select_sm90 {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBins = 2048, kBinsEach = kBins / kThreads;
constexpr int kBitmapWords = 4096, kWindow = 32 * kBitmapWords;
constexpr int kResidentEach = 32, kResident = kResidentEach * kThreads;
constexpr int kEach = 16;  // scores a thread holds of one stretch of a long row
constexpr int kStretch = kEach * kThreads;
constexpr uint32_t kRanked = 128;          // scores that are ranked one against the other
constexpr float kInfinity = __builtin_huge_valf();

struct Arguments {
  int64_t rows, columns;
  int k, capacity;
  const float* logits;
  int64_t logits_stride;
  const int32_t *start, *end;
  int32_t* indices;
  int64_t indices_stride;
  float* scores;
  int64_t scores_stride;
  int32_t *lengths, *nan_counts;
};

struct Shared {
  uint32_t bins[kBitmapWords];  // histogram, then bitmap
  uint32_t sums[kWarps], totals[kWarps], least[kWarps], most[kWarps];
  float parts[kWarps];
  uint32_t bin, above, in_bin;
  uint32_t ranked, key[kRanked], index[kRanked];
  uint32_t edge, index_end;
  uint32_t reserved, filled;    // of the buffer: places asked for, places before the first refusal
  uint16_t before[kBitmapWords];  // bits set in the words before; long rows alone
};

extern __shared__ __align__(16) unsigned char memory[];  // Shared, then the candidates, whose place the output takes on its way
__device__ __forceinline__ Shared& shared() { return *reinterpret_cast<Shared*>(memory); }

// Take every score above `edge` and, of those equal to it, the ones of index below `index_end`.
struct Cut {
  float edge;
  uint32_t index_end;
  __device__ __forceinline__ bool takes(float score, uint32_t index) const {
    return score > edge || (score == edge && index < index_end);
  }
};

// Sum over the threads before this one; *total over all.
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t own, Shared& s, uint32_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t upto = own;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, upto, d);
    if (lane >= d) upto += other;
  }
  if (lane == 31) s.sums[warp] = upto;
  __syncthreads();
  uint32_t before = upto - own, all = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const uint32_t sum = s.sums[i];
    if (i < warp) before += sum;
    all += sum;
  }
  *total = all;
  return before;
}

// Sum, least and greatest over the block.
__device__ __forceinline__ void extremes(uint32_t& sum, uint32_t& least, uint32_t& most, Shared& s) {
  sum = __reduce_add_sync(~0u, sum);
  least = __reduce_min_sync(~0u, least);
  most = __reduce_max_sync(~0u, most);
  if (threadIdx.x % 32 == 0) {
    const int warp = threadIdx.x / 32;
    s.totals[warp] = sum, s.least[warp] = least, s.most[warp] = most;
  }
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += s.totals[i], least = min(least, s.least[i]), most = max(most, s.most[i]);
}

// Sum over the block, for estimates: its order is fixed but its rounding is not the formula's.
__device__ __forceinline__ float block_sum(float own, Shared& s) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) own += __shfl_xor_sync(~0u, own, d);
  if (threadIdx.x % 32 == 0) s.parts[threadIdx.x / 32] = own;
  __syncthreads();
  own = 0.f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) own += s.parts[i];
  return own;
}

// Bins of a range of scores: equal steps of value, or of key where values do not divide (infinite or tiny ranges).
struct Bins {
  float scale, offset;
  uint32_t lo, width;
  int shift;
  bool by_value;
  __device__ Bins(uint32_t lo, uint32_t hi, bool first) : lo(lo), width(hi - lo) {
    const float least = score_of(lo), range = score_of(hi) - least;
    by_value = first && range > 1e-30f && range < 1e30f && fabsf(least) < 1e30f;
    scale = by_value ? (kBins - 0.5f) / range : 0.f;
    offset = -least * scale;
    shift = max(0, 32 - __clz(width) - 11);
  }
  __device__ __forceinline__ float place(float x) const { return fmaf(x, scale, offset); }  // rises with x
  __device__ __forceinline__ uint32_t of_score(float x) const {
    return min(__float2uint_rz(place(x)), static_cast<uint32_t>(kBins - 1));
  }
  __device__ __forceinline__ uint32_t of_key(uint32_t key) const { return (key - lo) >> shift; }
};

// The histogram in s.bins is complete: the bin in which the need-th from the top lies -> s.bin, s.above, s.in_bin.
// Returns the number of all that were counted.
__device__ __forceinline__ uint32_t find_bin(uint32_t need, Shared& s) {
  const int top = kBins - kBinsEach * (threadIdx.x + 1);  // this thread's bins, the first thread has the highest
  uint32_t count[kBinsEach], own = 0, total;
#pragma unroll
  for (int i = 0; i < kBinsEach; i += 4) {
    const uint4 c = *reinterpret_cast<const uint4*>(&s.bins[top + i]);
    count[i] = c.x, count[i + 1] = c.y, count[i + 2] = c.z, count[i + 3] = c.w;
    own += c.x + c.y + c.z + c.w;
  }
  uint32_t above = exclusive_sum(own, s, &total);
  if (above < need && need <= above + own) {
#pragma unroll
    for (int i = kBinsEach - 1; i >= 0; --i) {
      if (above < need && need <= above + count[i]) s.bin = top + i, s.above = above, s.in_bin = count[i];
      above += count[i];
    }
  }
  __syncthreads();
  return total;
}

__device__ __forceinline__ void clear_bins(Shared& s) {
#pragma unroll
  for (int i = 0; i < kBinsEach; ++i) s.bins[threadIdx.x + i * kThreads] = 0;
  if (threadIdx.x == 0) s.ranked = 0;
}

// Ranks the scores that collect(f) hands to f(score, index), at most kRanked of them: the need-th best of them ->
// s.edge, s.index_end.
template <class Collect>
__device__ __forceinline__ void rank(const Collect& collect, uint32_t need, Shared& s) {
  collect([&](float x, uint32_t index) {
    const uint32_t at = atomicAdd(&s.ranked, 1u);
    s.key[at] = key_of(x), s.index[at] = index;
  });
  __syncthreads();
  const uint32_t n = s.ranked;
  if (threadIdx.x < n) {
    const uint32_t key = s.key[threadIdx.x], index = s.index[threadIdx.x];
    uint32_t better = 0;
    for (uint32_t i = 0; i < n; ++i) better += s.key[i] > key || (s.key[i] == key && s.index[i] < index);
    if (better == need - 1) s.edge = key, s.index_end = index + 1;
  }
  __syncthreads();
}

// The k best (k >= 1) of scores above -inf, of which at least k have keys from lo to hi and none has a greater one.
// visit(f) calls f(score, index) for each of this thread's scores and possibly for some of -inf; indices are below n.
// floor: a guess below which the k-th best does not lie, or -inf; it costs a pass when wrong.
template <class Visit>
__device__ Cut find_cut(const Visit& visit, uint32_t lo, uint32_t hi, float floor, uint32_t k, uint32_t n, Shared& s) {
  uint32_t need = k;
  for (bool first = true; lo != hi; first = false) {
    const Bins bins(first && floor > score_of(lo) && floor < score_of(hi) ? key_of(floor) : lo, hi, first);
    clear_bins(s);
    __syncthreads();
    if (bins.by_value) {
      const float from = score_of(bins.lo);
      visit([&](float x, uint32_t) { if (x >= from) atomicAdd(&s.bins[bins.of_score(x)], 1u); });
    } else {
      visit([&](float x, uint32_t) {
        const uint32_t key = key_of(x);
        if (key - bins.lo <= bins.width) atomicAdd(&s.bins[bins.of_key(key)], 1u);
      });
    }
    __syncthreads();
    if (find_bin(need, s) < need) {  // the floor was too high
      floor = -kInfinity;
      continue;
    }
    const uint32_t bin = s.bin, in_bin = s.in_bin;
    need -= s.above;
    const auto in_play = [&](auto f) {
      if (bins.by_value) {
        const float from = bin == 0 ? score_of(bins.lo) : -kInfinity, least = bin, end = bin == kBins - 1 ? kInfinity : bin + 1;
        visit([&](float x, uint32_t index) {
          const float y = bins.place(x);
          if ((bin == 0 || y >= least) && y < end && x >= from) f(x, index);
        });
      } else {
        visit([&](float x, uint32_t index) {
          const uint32_t key = key_of(x);
          if (key - bins.lo <= bins.width && bins.of_key(key) == bin) f(x, index);
        });
      }
    };
    if (in_bin <= kRanked) {
      rank(in_play, need, s);
      return {score_of(s.edge), s.index_end};
    }
    float least = kInfinity, most = -kInfinity;
    in_play([&](float x, uint32_t) { least = fminf(least, x), most = fmaxf(most, x); });
    uint32_t count = 0;
    lo = key_of(least), hi = key_of(most);
    extremes(count, lo, hi, s);
    if (need == in_bin) return {score_of(lo - 1), 0};
  }
  // All that remain are equal: the lowest indices. Steps of the index, then of its remainder.
  const float edge = score_of(lo);
  for (uint32_t from = 0, width = n;;) {
    const int shift = max(0, 32 - __clz(width - 1) - 11);
    clear_bins(s);
    __syncthreads();
    visit([&](float x, uint32_t index) {
      if (x == edge && index - from < width) atomicAdd(&s.bins[kBins - 1 - ((index - from) >> shift)], 1u);
    });
    __syncthreads();
    find_bin(need, s);
    const uint32_t step = kBins - 1 - s.bin, in_bin = s.in_bin;
    need -= s.above;
    from += step << shift, width = 1u << shift;
    if (in_bin == need) return {edge, from + width};
    if (in_bin <= kRanked) {
      rank([&](auto f) { visit([&](float x, uint32_t index) { if (x == edge && index - from < width) f(x, index); }); }, need, s);
      return {edge, s.index_end};
    }
  }
}

// Keeps the compiler from computing something once for several passes over registers: it would need as many again.
__device__ __forceinline__ float afresh(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
__device__ __forceinline__ uint32_t afresh(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A candidate of a long row: its score's bits and its index, counted from the row's first score.
__device__ __forceinline__ uint2* candidates() { return reinterpret_cast<uint2*>(memory + sizeof(Shared)); }

// The k best of the first n candidates (n > k) of a row of row_n scores.
__device__ __noinline__ Cut cut_buffer(uint32_t n, uint32_t k, uint32_t row_n) {
  Shared& s = shared();
  const auto visit = [&](auto f) {
    for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
      const uint2 c = candidates()[i];
      f(__uint_as_float(c.x), c.y);
    }
  };
  float least = kInfinity, most = -kInfinity;
  visit([&](float x, uint32_t) { least = fminf(least, x), most = fmaxf(most, x); });
  uint32_t count = 0, lo = key_of(least), hi = key_of(most);
  extremes(count, lo, hi, s);
  return find_cut(visit, lo, hi, -kInfinity, k, row_n, s);
}

// Drops the candidates that the cut does not take.
__device__ __noinline__ void compact(uint32_t n, const Cut cut) {
  Shared& s = shared();
  constexpr int kRound = 4;
  __syncthreads();
  if (threadIdx.x == 0) s.reserved = 0;
  for (uint32_t first = 0; first < n; first += kRound * kThreads) {
    uint2 kept[kRound];
    uint32_t taken = 0, mask = 0;
#pragma unroll
    for (int i = 0; i < kRound; ++i) {
      const uint32_t at = first + i * kThreads + threadIdx.x;
      if (at >= n) continue;
      kept[i] = candidates()[at];
      if (cut.takes(__uint_as_float(kept[i].x), kept[i].y)) mask |= 1u << i, ++taken;
    }
    __syncthreads();
    uint32_t upto = taken;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += other;
    }
    uint32_t at = 0;
    if (lane == 31) at = atomicAdd(&s.reserved, upto);
    at = __shfl_sync(~0u, at, 31) + upto - taken;
#pragma unroll
    for (int i = 0; i < kRound; ++i)
      if (mask >> i & 1) candidates()[at++] = kept[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) s.filled = ~0u;
  __syncthreads();
}

// Where a row's selection goes.
struct Output {
  int32_t* indices;
  float* scores;  // null: not wanted
};

// Writes the indices whose bits are set in the first `words` words, in order, from place `done` of the row on; returns
// the number of places filled so far. Bits stand for first, first + 1, ... staging: shared memory through which the
// indices leave in whole lines; null: each thread writes its own.
__device__ uint32_t emit(uint32_t words, uint32_t first, uint32_t done, int32_t* staging, int32_t* out, Shared& s) {
  const uint32_t each = (words + kThreads - 1) / kThreads;
  const uint32_t from = min(threadIdx.x * each, words), to = min(from + each, words);
  uint32_t own = 0, total;
  for (uint32_t w = from; w < to; ++w) own += __popc(s.bins[w]);
  uint32_t at = exclusive_sum(own, s, &total);
  int32_t* const target = staging ? staging : out + done;
  for (uint32_t w = from; w < to; ++w)
    for (uint32_t bits = s.bins[w]; bits; bits &= bits - 1) target[at++] = static_cast<int32_t>(first + 32 * w + __ffs(bits) - 1);
  if (staging) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < total; i += kThreads) out[done + i] = staging[i];
  }
  return done + total;
}

// How many bits are set in the words before each of the first `words` ones -> s.before; returns those of all.
__device__ __forceinline__ uint32_t count_before(uint32_t words, Shared& s) {
  const uint32_t each = (words + kThreads - 1) / kThreads;
  const uint32_t from = min(threadIdx.x * each, words), to = min(from + each, words);
  uint32_t own = 0, total;
  for (uint32_t w = from; w < to; ++w) own += __popc(s.bins[w]);
  uint32_t before = exclusive_sum(own, s, &total);
  for (uint32_t w = from; w < to; ++w) {
    s.before[w] = static_cast<uint16_t>(before);
    before += __popc(s.bins[w]);
  }
  __syncthreads();
  return total;
}
// The place among the selected of the first bit that is set at or after `at`.
__device__ __forceinline__ uint32_t place_of(uint32_t at, const Shared& s) {
  return s.before[at / 32] + __popc(s.bins[at / 32] & ((1u << at % 32) - 1));
}

// Writes the scores of the n candidates whose bits are set to the places that their indices take. Bits stand for first,
// first + 1, ..., counted from the row's first score.
__device__ __noinline__ void emit_scores(uint32_t n, uint32_t words, uint32_t first, float* out) {
  Shared& s = shared();
  count_before(words, s);
  for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
    const uint2 c = candidates()[i];
    const uint32_t at = c.y - first;
    if (at < 32 * words && s.bins[at / 32] >> (at % 32) & 1) out[place_of(at, s)] = __uint_as_float(c.x);
  }
  __syncthreads();
}

__device__ __forceinline__ void pad(uint32_t done, uint32_t k, int32_t* out) {
  for (uint32_t i = done + threadIdx.x; i < k; i += kThreads) out[i] = -1;
}

__device__ __forceinline__ float4 load4(const float* p) {
  float4 v;
  asm("ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
  return v;
}

// A row's n scores as whole 16-byte words, with up to three single scores before and after them.
struct Row {
  const float* scores;
  uint32_t n, head, words;
  __device__ Row(const float* p, uint32_t n) : scores(p), n(n) {
    head = min(n, static_cast<uint32_t>(-(reinterpret_cast<uintptr_t>(p) >> 2) & 3));
    words = (n - head) / 4;
  }
  __device__ __forceinline__ uint32_t index(uint32_t word) const { return head + 4 * word; }
  __device__ __forceinline__ float4 word(uint32_t w) const {
    return w < words ? load4(scores + index(w)) : make_float4(-kInfinity, -kInfinity, -kInfinity, -kInfinity);
  }
  // The single scores: thread i < singles() holds single_index(i).
  __device__ __forceinline__ uint32_t singles() const { return n - 4 * words; }
  __device__ __forceinline__ uint32_t single_index(uint32_t i) const { return i < head ? i : i + 4 * words; }
};

// A row of at most kResident scores. Returns the number selected.
__device__ uint32_t select_resident(const Row& row, uint32_t k, uint32_t begin, int32_t* staging, const Output& out,
                                    uint32_t& nans, Shared& s) {
  float x[kResidentEach], single = -kInfinity;
#pragma unroll
  for (int i = 0; i < kResidentEach / 4; ++i) {
    const float4 v = row.word(i * kThreads + threadIdx.x);
    x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
  }
  const bool have_single = threadIdx.x < row.singles();
  const uint32_t single_index = row.single_index(threadIdx.x);
  if (have_single) single = __ldg(row.scores + single_index);
  float least = x[0], most = x[0], other = x[1], mean = 0.f;  // most and other: the greatest of even and odd places
  bool odd = false;                                           // NaN
#pragma unroll
  for (int i = 0; i < kResidentEach; ++i) {
    least = fminf(least, x[i]), mean += x[i];
    (i % 2 ? other : most) = fmaxf(i % 2 ? other : most, x[i]);
    odd |= x[i] != x[i];
  }
  bool tied = most == other;
  most = fmaxf(most, other);
  uint32_t valid = kResidentEach;
  if (odd || !(least > -kInfinity)) {  // absent scores, -inf or NaN among them
    valid = 0, least = kInfinity, most = -kInfinity, mean = 0.f, tied = false;
#pragma unroll
    for (int i = 0; i < kResidentEach; ++i) {
      if (x[i] != x[i]) ++nans, x[i] = -kInfinity;
      if (x[i] > -kInfinity) ++valid, least = fminf(least, x[i]), most = fmaxf(most, x[i]), mean += x[i];
    }
  }
  if (single != single) ++nans, single = -kInfinity;
  if (single > -kInfinity) ++valid, least = fminf(least, single), most = fmaxf(most, single), mean += single;
  uint32_t lo = key_of(least), hi = key_of(most);
  mean = block_sum(mean, s);
  constexpr int kTiedShift = 16;  // above the number of valid scores, the number of threads whose greatest came twice
  valid |= static_cast<uint32_t>(tied) << kTiedShift;
  extremes(valid, lo, hi, s);
  const uint32_t ties = valid >> kTiedShift;
  valid &= (1u << kTiedShift) - 1;
  Cut cut{-kInfinity, 0};
  if (valid > k) {
    const auto visit = [&](auto f) {
      f(single, single_index);
      const uint32_t index = afresh(row.index(threadIdx.x));
#pragma unroll
      for (int i = 0; i < kResidentEach; ++i) f(afresh(x[i]), index + (i / 4) * 4 * kThreads + i % 4);
    };
    if (ties > kThreads / 2) {  // perhaps all that is wanted equals the greatest
      const float top = score_of(hi);
      uint32_t equal = 0, total;
      visit([&](float y, uint32_t) { equal += y == top; });
      exclusive_sum(equal, s, &total);
      if (total >= k) lo = hi;
    }
    // Where the mean leaves enough scores above it, the others need not be counted.
    mean = valid / 9 * 4 > k ? mean / valid : -kInfinity;
    cut = find_cut(visit, lo, hi, mean, k, row.n, s);
  }
  const uint32_t words = (row.n + 31) / 32;
  for (uint32_t w = threadIdx.x; w < words; w += kThreads) s.bins[w] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kResidentEach / 4; ++i) {
    const uint32_t index = afresh(row.index(threadIdx.x)) + i * 4 * kThreads;
    uint32_t mask = 0;
    bool tie = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (x[4 * i + j] >= cut.edge) mask |= 1u << j;
      tie |= x[4 * i + j] == cut.edge;
    }
    if (tie) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (!cut.takes(x[4 * i + j], index + j)) mask &= ~(1u << j);
    }
    if (mask == 0) continue;
    const uint64_t wide = static_cast<uint64_t>(mask) << (index & 31);  // four neighbours fall into one or two words
    if (static_cast<uint32_t>(wide)) atomicOr(&s.bins[index / 32], static_cast<uint32_t>(wide));
    if (wide >> 32) atomicOr(&s.bins[index / 32 + 1], static_cast<uint32_t>(wide >> 32));
  }
  if (have_single && cut.takes(single, single_index)) atomicOr(&s.bins[single_index / 32], 1u << (single_index & 31));
  __syncthreads();
  if (out.scores) {
    float* const in_order = reinterpret_cast<float*>(staging + k);
    const uint32_t total = count_before(words, s);
#pragma unroll
    for (int i = 0; i < kResidentEach / 4; ++i) {
      const uint32_t index = afresh(row.index(threadIdx.x)) + i * 4 * kThreads, word = index / 32;
      if (i * kThreads + threadIdx.x >= row.words) break;
      const uint32_t mask = __funnelshift_r(s.bins[word], word + 1 < words ? s.bins[word + 1] : 0, index);
      if ((mask & 15) == 0) continue;
      float* to = in_order + place_of(index, s);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (mask >> j & 1) *to++ = x[4 * i + j];
    }
    if (have_single && s.bins[single_index / 32] >> (single_index % 32) & 1) in_order[place_of(single_index, s)] = single;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < total; i += kThreads) out.scores[i] = in_order[i];
  }
  return emit(words, begin, 0, staging, out.indices, s);
}

// The same out of line: a long row's registers need not bear with a short one's.
__device__ __noinline__ uint32_t select_short(const Row row, uint32_t k, uint32_t begin, const Output out, uint32_t* nans) {
  uint32_t own = 0;
  const uint32_t done = select_resident(row, k, begin, reinterpret_cast<int32_t*>(candidates()), out, own, shared());
  *nans = own;
  return done;
}

// A threshold below which the row's k-th best score most likely does not lie, from a sample of kEach scores a thread
// spread over the row.
template <int kEach>
__device__ __noinline__ float first_threshold(const Row row, uint32_t k) {
  constexpr int kSample = kEach * kThreads;
  Shared& s = shared();
  const float mean = static_cast<float>(kSample) * k / row.n, wanted = mean + 4.5f * sqrtf(mean) + 4.f;
  if (wanted > 0.9f * kSample) return -kInfinity;
  float x[kEach], least = kInfinity, most = -kInfinity;
  uint32_t valid = 0;
  const uint32_t pairs = row.words / 2;  // two threads read 32 contiguous bytes
#pragma unroll
  for (int i = 0; i < kEach / 4; ++i) {
    const uint32_t place = (i * kThreads + threadIdx.x) / 2;
    const uint32_t pair = static_cast<uint32_t>(static_cast<uint64_t>(place) * pairs / (kSample / 8));
    const float4 v = row.word(2 * pair + (threadIdx.x & 1));
    x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (x[i] > -kInfinity) ++valid, least = fminf(least, x[i]);
    else x[i] = -kInfinity;
    most = fmaxf(most, x[i]);
  }
  uint32_t lo = key_of(least), hi = key_of(most);
  extremes(valid, lo, hi, s);
  const uint32_t need = static_cast<uint32_t>(wanted);
  if (valid <= need) return -kInfinity;
  const auto visit = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) f(afresh(x[i]), i * kThreads + threadIdx.x);
  };
  const Cut cut = find_cut(visit, lo, hi, -kInfinity, need, kSample, s);
  const uint32_t edge = key_of(cut.edge);
  return cut.index_end > 0 ? score_of(edge - 1) : cut.edge;  // equals of the edge are candidates
}

// Reads the row once; leaves the candidates above the final threshold in the buffer and returns their number.
__device__ uint32_t gather(const Row& row, uint32_t k, float threshold, uint32_t capacity, uint32_t& nans) {
  Shared& s = shared();
  __syncthreads();
  if (threadIdx.x == 0) s.reserved = 0, s.filled = ~0u;
  __syncthreads();
  const auto single = [&](uint32_t index) {
    const float x = __ldg(row.scores + index);
    nans += x != x;
    if (x > threshold) {
      candidates()[atomicAdd(&s.reserved, 1u)] = make_uint2(__float_as_uint(x), index);
    }
  };
  if (threadIdx.x < row.head) single(threadIdx.x);
  float now[kEach], next[kEach];
  const auto load = [&](uint32_t stretch, float(&to)[kEach]) {
#pragma unroll
    for (int i = 0; i < kEach / 4; ++i) {
      const float4 v = row.word(stretch + i * kThreads + threadIdx.x);
      to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
  };
  const auto index_of = [&](uint32_t stretch, int i) { return row.index(stretch + threadIdx.x) + (i / 4) * 4 * kThreads + i % 4; };
  load(0, next);
  const int lane = threadIdx.x % 32;
  const uint32_t candidates_address = static_cast<uint32_t>(__cvta_generic_to_shared(candidates()));
  bool pending = true;          // this warp's scores of the stretch are not in the buffer yet
  uint32_t ties_end = 0;        // nonzero while a stretch is taken up again: the cut's index_end
  for (uint32_t stretch = 0; stretch < row.words;) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) now[i] = next[i];
    load(stretch + kStretch / 4, next);
    float limit = threshold;
    if (ties_end == 0) {
      bool nan = false;
#pragma unroll
      for (int i = 0; i < kEach; ++i) nan |= now[i] != now[i];
      if (nan)
#pragma unroll
        for (int i = 0; i < kEach; ++i) nans += now[i] != now[i];
    } else {
      // What still waits is held against the cut itself, equal scores index by index.
      limit = score_of(key_of(threshold) - 1);
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (now[i] == threshold && index_of(stretch, i) + 1 >= ties_end) now[i] = -kInfinity;
    }
    if (pending) {
      uint32_t own = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) own += now[i] > limit;
      pending = false;
      if (__any_sync(~0u, own)) {
        uint32_t upto = own;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
          const uint32_t other = __shfl_up_sync(~0u, upto, d);
          if (lane >= d) upto += other;
        }
        uint32_t base = 0;
        if (lane == 31) {
          base = atomicAdd(&s.reserved, upto);
          if (base + upto > capacity) atomicMin(&s.filled, base), base = ~0u;
        }
        base = __shfl_sync(~0u, base, 31);
        pending = base == ~0u;
        if (!pending) {
          uint32_t to = candidates_address + (base + upto - own) * sizeof(uint2);
          const uint32_t index = index_of(stretch, 0);
#pragma unroll
          for (int i = 0; i < kEach; ++i)  // without branches
            asm volatile(
                "{\n .reg .pred p;\n setp.gt.f32 p, %1, %2;\n @p st.shared.v2.b32 [%0], {%3, %4};\n @p add.u32 %0, %0, 8;\n}"
                : "+r"(to)
                : "f"(now[i]), "f"(limit), "r"(__float_as_uint(now[i])), "r"(index + (i / 4) * 4 * kThreads + i % 4)
                : "memory");
        }
      }
    }
    if (__syncthreads_or(pending)) {
      // The buffer is full: cut it to its k best and take up the stretch again. Whatever comes after the stretch loses
      // to earlier equals of the edge.
      const uint32_t n = min(s.reserved, s.filled);
      const Cut cut = cut_buffer(n, k, row.n);
      compact(n, cut);
      threshold = cut.edge;
      ties_end = cut.index_end + 1;
      load(stretch, next);
    } else {
      pending = true;
      ties_end = 0;
      stretch += kStretch / 4;
    }
  }
  __syncthreads();
  const uint32_t tail = row.singles() - row.head, n = s.reserved;
  __syncthreads();
  if (n + tail > capacity) {
    const Cut cut = cut_buffer(n, k, row.n);
    compact(n, cut);
    threshold = cut.edge;
  }
  if (threadIdx.x < tail) single(row.n - tail + threadIdx.x);
  __syncthreads();
  return s.reserved;
}

template <bool kLong>  // whether a row may be longer than kResident
__global__ void __launch_bounds__(kThreads, kLong ? 3 : 4) select(const Arguments a) {
  Shared& s = shared();
  const uint32_t capacity = a.capacity;
  const int64_t t = a.rows - 1 - blockIdx.x;  // causal rows: the longest first
  const int32_t columns = static_cast<int32_t>(a.columns);
  const int32_t begin = a.start ? max(a.start[t], 0) : 0, end = a.end ? min(a.end[t], columns) : columns;
  const Row row(a.logits + t * a.logits_stride + begin, begin < end ? end - begin : 0);
  const Output out{a.indices + t * a.indices_stride, a.scores ? a.scores + t * a.scores_stride : nullptr};
  const uint32_t k = a.k;
  uint32_t nans = 0, done = 0;
  if (kLong && row.n <= kResident) {
    done = select_short(row, k, begin, out, &nans);
  } else if (!kLong) {
    done = select_resident(row, k, begin, reinterpret_cast<int32_t*>(candidates()), out, nans, s);
  } else {
    const float threshold = row.n > 65536 ? first_threshold<16>(row, k) : first_threshold<8>(row, k);
    uint32_t n = gather(row, k, threshold, capacity, nans);
    if (n < k && threshold > -kInfinity) nans = 0, n = gather(row, k, -kInfinity, capacity, nans);
    const Cut cut = n > k ? cut_buffer(n, k, row.n) : Cut{-kInfinity, 0};
    for (uint32_t window = 0; window < row.n; window += kWindow) {
      const uint32_t words = (min(row.n - window, static_cast<uint32_t>(kWindow)) + 31) / 32;
      __syncthreads();
      for (uint32_t w = threadIdx.x; w < words; w += kThreads) s.bins[w] = 0;
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
        const uint2 c = candidates()[i];
        const uint32_t at = c.y - window;
        if (at < kWindow && cut.takes(__uint_as_float(c.x), c.y)) atomicOr(&s.bins[at / 32], 1u << (at % 32));
      }
      __syncthreads();
      if (out.scores) emit_scores(n, words, window, out.scores + done);
      // The candidates of a row of several windows are needed again.
      done = emit(words, begin + window, done, row.n <= kWindow ? reinterpret_cast<int32_t*>(candidates()) : nullptr, out.indices, s);
    }
  }
  pad(done, k, out.indices);
  if (a.nan_counts) {
    uint32_t total;
    __syncthreads();
    exclusive_sum(nans, s, &total);
    nans = total;
  }
  if (threadIdx.x == 0) {
    a.lengths[t] = done;
    if (a.nan_counts) a.nan_counts[t] = nans;
  }
}

}  // namespace topk_select_sm90

bool sm90_supports(const TopKSelectParams& p, const char** why_not) {
  const auto no = [&](const char* why) { return *why_not = why, false; };
  if (!cuda::is_hopper()) return no("the current device is not of compute capability 9.0");
  if (p.k < 1 || p.k > 4096) return no("k is not in 1 to 4096");
  if (p.columns < 0 || p.columns > int64_t{1} << 30) return no("more than 2^30 scores in a row");
  if (p.rows < 0 || p.rows >= int64_t{1} << 31) return no("2^31 rows or more");
  return true;
}

void launch_topk_select_sm90(const TopKSelectParams& p) {
  using namespace topk_select_sm90;
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot run topk_select for Hopper (") + why + ") choose another implementation");
  if (p.rows == 0) return;
  if (p.columns > 0 && p.columns <= kNarrow) return launch_narrow(p);
  const bool is_long = p.columns > kResident;
  const int capacity = p.k <= 2048 ? 4096 : 8192;  // at least k + what one warp may add at once (512)
  const int bytes = static_cast<int>(sizeof(Shared)) + (is_long ? capacity * 8 : p.k * (p.scores ? 8 : 4));
  const auto kernel = is_long ? select<true> : select<false>;
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
              "reserve shared memory for topk_select");
  const Arguments a{p.rows, p.columns, p.k, capacity, p.logits, p.logits_stride, p.start, p.end,
                    p.indices, p.indices_stride, p.scores, p.scores_stride, p.lengths, p.nan_counts};
  kernel<<<static_cast<unsigned>(p.rows), kThreads, bytes, p.stream>>>(a);
  cuda::check(cudaGetLastError(), "launch topk_select");
}

}  // namespace dsa
