// Sums of many contributions in any order, the same bits every time: integers of 21 bits, three to a 64-bit word, added
// to global memory as words (sparse_mla's dkv, indexer_kl's dk).
//
//   i = round(x / quantum), |i| < 2^22      word = i0 + i1 2^21 + i2 2^42  mod 2^64      table[word] += word
//
// A sum of words is the word of the sums: fields may pass their bits on the way, only the final sums must lie in
// +-2^20. One that does not spills into the field above and looks like other sums in range, so a table carries a
// checksum before its first row: every kernel that adds also sums weight * i (mod 2^32) of what it adds, and the end of
// the sums compares that with the same of the decoded fields. The weights are odd, but for those of the lowest fields,
// which are 0. A sum too large by c 2^21 (c 2^22 in the uppermost field) changes the comparison by c (w' - 2^21 w), w'
// being the weight of the field above: an odd number times c; in the uppermost field by c 2^22 w. So one sum out of
// range is always seen (in the uppermost field, unless it passes 2^31). Of many at once none is seen with a chance of
// about 2^-32: the weights are hashes.
// A contribution that is NaN, infinite or beyond 2^22 quanta has no integer; a bit of its own says so.
//
// A row's words belong to owners, the threads that hold its columns: every owner has a sequence of columns, three to a
// word. What a layout says of them:
//   kRowWords, kColumns
//   owner(word), first(word): whose word it is, and which of the owner's columns is its lowest field
//   column(owner, n): the column of the owner's n-th, or -1 if it has none (the field is then zero)
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/check.h"
#include "kernels/quantum.h"

namespace dsa::cuda {

/// A table: its head, then the rows. It is 128-byte aligned, and clear when all its bytes are zero.
struct alignas(128) PackedSumsHead {
  uint32_t checksum;
  uint32_t out_of_range;  ///< not 0: some contribution had no integer
};
template <typename Layout>
constexpr int64_t packed_sums_bytes(int64_t rows) {
  return static_cast<int64_t>(sizeof(PackedSumsHead)) + rows * Layout::kRowWords * 8;
}
__host__ __device__ inline PackedSumsHead* packed_sums_head(uint64_t* table) {
  return reinterpret_cast<PackedSumsHead*>(table);
}
__host__ __device__ inline uint64_t* packed_sums_rows(uint64_t* table) { return table + sizeof(PackedSumsHead) / 8; }

constexpr __host__ __device__ uint32_t odd_hash(uint32_t x) {
  x = (x + 1) * 0x9E3779B1u;
  x = (x ^ x >> 16) * 0x7FEB352Du;
  return (x ^ x >> 15) | 1;
}
/// The weight of an owner's n-th column is the product of three. For constant n it is an immediate operand.
__device__ __forceinline__ uint32_t row_weight(uint32_t row) { return odd_hash(row); }
__device__ __forceinline__ uint32_t owner_weight(uint32_t owner) { return odd_hash(0x40000000 + owner); }
constexpr __host__ __device__ uint32_t column_weight(uint32_t n) { return n % 3 ? odd_hash(0x60000000 + n) : 0; }

/// Contributions as integers: the low bits of x + 1.5 * 2^23 quanta, less those of zero.
struct Quanta {
  float magic;
  uint32_t zero;  ///< raw(0)
  uint64_t base;  ///< less the three zeros of a word

  explicit __device__ __forceinline__ Quanta(float of) {
    magic = of;
    zero = __float_as_uint(of);
    base = -(zero * (1 + (1ull << 21) + (1ull << 42)));
  }
  /// The integer plus `zero`.
  __device__ __forceinline__ uint32_t raw(float x) const { return __float_as_uint(__fadd_rn(x, magic)); }
  __device__ __forceinline__ float rounded(uint32_t raw) const { return __fsub_rn(__uint_as_float(raw), magic); }
  __device__ __forceinline__ uint64_t word(uint32_t raw0, uint32_t raw1, uint32_t raw2) const {
    return base + raw0 + raw1 * (1ull << 21) + (uint64_t{raw2 << 10} << 32);
  }
};
/// The same in fewer instructions: a word's upper two fields are made with a magic number that lies below the other by
/// as many quanta as zero >> 21, so that in a word the zeros cancel (zero's low 22 bits are 0).
struct QuantaOfWords : Quanta {
  float upper;
  uint32_t upper_zero;  ///< raw_upper(0)

  explicit __device__ __forceinline__ QuantaOfWords(float of) : Quanta(of) {
    upper_zero = zero - (zero >> 21);
    upper = __uint_as_float(upper_zero);
  }
  __device__ __forceinline__ uint32_t raw_upper(float x) const { return __float_as_uint(__fadd_rn(x, upper)); }
  __device__ __forceinline__ uint64_t word(uint32_t raw0, uint32_t upper1, uint32_t upper2) const {
    return (uint64_t{upper2 << 10} << 32 | raw0) + upper1 * (1ull << 21);
  }
};
/// The magic number of a quantum that is a power of two.
inline float magic_of(float quantum) { return quantum * 0x1.8p23f; }

/// A thread's share of the checksum.
class PackedSumsCheck {
 public:
  /// Of columns of an owner's row, as raw integers. Constant weights add up while compiling.
  struct Row {
    uint32_t sum = 0, weights = 0, upper_weights = 0, range = 0;
    __device__ __forceinline__ void add(uint32_t raw, uint32_t column_weight, const Quanta& quanta) {
      sum += raw * column_weight;
      weights += column_weight;
      range |= raw ^ quanta.zero;
    }
    __device__ __forceinline__ void add_upper(uint32_t raw_upper, uint32_t column_weight, const QuantaOfWords& quanta) {
      sum += raw_upper * column_weight;
      upper_weights += column_weight;
      range |= raw_upper ^ quanta.zero;
    }
  };
  /// weight: row_weight * owner_weight, or 0 for a row that does not count.
  __device__ __forceinline__ void add(const Row& row, uint32_t weight, const Quanta& quanta) {
    sum_ += (row.sum - quanta.zero * row.weights) * weight;
    if (weight) range_ |= row.range;
  }
  __device__ __forceinline__ void add(const Row& row, uint32_t weight, const QuantaOfWords& quanta) {
    sum_ += (row.sum - quanta.zero * row.weights - quanta.upper_zero * row.upper_weights) * weight;
    if (weight) range_ |= row.range;
  }
  __device__ __forceinline__ void add_out_of_range() { range_ = ~0u; }

  /// By whole warps, once at the end of a kernel.
  __device__ __forceinline__ void leave(PackedSumsHead* head) const {
    const uint32_t sum = __reduce_add_sync(~0u, sum_), range = __reduce_or_sync(~0u, range_);
    if (threadIdx.x % 32) return;
    if (sum) atomicAdd(&head->checksum, sum);
    if (range >> 23) atomicOr(&head->out_of_range, 1u);
  }

 private:
  uint32_t sum_ = 0, range_ = 0;
};

__device__ __forceinline__ void add_word(uint64_t* to, uint64_t word) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

/// Takes the lowest field's sum out of a word and leaves the others one field lower.
__device__ __forceinline__ int next_field(int64_t& word) {
  const int sum = static_cast<int>(static_cast<uint32_t>(word) << 11) >> 11;
  word = (word - sum) >> 21;
  return sum;
}

constexpr int kFinishWarps = 8;

// One warp a row.
template <typename Layout, bool kBf16>
__global__ void __launch_bounds__(32 * kFinishWarps)
    finish_packed_sums(const uint64_t* table, int64_t rows, float quantum, void* out, QuantumReport* report) {
  __shared__ alignas(16) float buffer[kFinishWarps][Layout::kColumns];
  const int lane = threadIdx.x % 32;
  float* const columns = buffer[threadIdx.x / 32];
  uint32_t most = 0, checksum = 0;
  const int64_t stride = int64_t{kFinishWarps} * gridDim.x;
  for (int64_t row = blockIdx.x * int64_t{kFinishWarps} + threadIdx.x / 32; row < rows; row += stride) {
    constexpr int kTurns = (Layout::kRowWords + 31) / 32;
    const uint64_t* const from = table + sizeof(PackedSumsHead) / 8 + row * Layout::kRowWords + lane;
    int64_t words[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i)
      words[i] = 32 * i + lane < Layout::kRowWords ? static_cast<int64_t>(__ldcs(from + 32 * i)) : 0;
    uint32_t part = 0;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int word = 32 * i + lane;
      if (word >= Layout::kRowWords) continue;
      const int owner = Layout::owner(word), first = Layout::first(word);
      const int sums[3] = {next_field(words[i]), next_field(words[i]), static_cast<int>(words[i])};
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        part += sums[j] * column_weight(first + j) * owner_weight(owner);
        most = max(most, static_cast<uint32_t>(abs(sums[j])));
        const int column = Layout::column(owner, first + j);
        if (column >= 0) columns[column] = static_cast<float>(sums[j]) * quantum;
      }
    }
    checksum += part * row_weight(static_cast<uint32_t>(row));
    __syncwarp();
    constexpr int kAtOnce = kBf16 ? 8 : 4;
    auto* const to = static_cast<char*>(out) + row * Layout::kColumns * (kBf16 ? 2 : 4);
    for (int c = kAtOnce * lane; c < Layout::kColumns; c += 32 * kAtOnce) {
      const float4 x = *reinterpret_cast<const float4*>(columns + c);
      if constexpr (kBf16) {
        const float4 y = *reinterpret_cast<const float4*>(columns + c + 4);
        alignas(16) const __nv_bfloat162 pairs[4] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w),
                                                     __floats2bfloat162_rn(y.x, y.y), __floats2bfloat162_rn(y.z, y.w)};
        *reinterpret_cast<uint4*>(to + 2 * c) = *reinterpret_cast<const uint4*>(pairs);
      } else {
        *reinterpret_cast<float4*>(to + 4 * c) = x;
      }
    }
    __syncwarp();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    const auto* const head = reinterpret_cast<const PackedSumsHead*>(table);
    checksum -= head->checksum;
    if (head->out_of_range) most = ~0u;
  }
  most = __reduce_max_sync(~0u, most);
  checksum = __reduce_add_sync(~0u, checksum);
  if (lane == 0) {
    atomicMax(&report->most, most);
    atomicAdd(&report->difference, checksum);
  }
}

/// Writes the sums of a table, rows x kColumns as bf16 or fp32 in natural order, and the report (on the device). A
/// contribution without an integer makes report->most the greatest number.
template <typename Layout>
void launch_finish_packed_sums(const uint64_t* table, int64_t rows, float quantum, void* out, bool bf16,
                               QuantumReport* report, cudaStream_t stream) {
  static_assert(Layout::kColumns % 8 == 0);
  check(cudaMemsetAsync(report, 0, sizeof(QuantumReport), stream), "clear the report of the packed sums");
  const auto blocks = static_cast<unsigned>(std::clamp<int64_t>((rows + kFinishWarps - 1) / kFinishWarps, 1, 1056));
  const auto finish = bf16 ? finish_packed_sums<Layout, true> : finish_packed_sums<Layout, false>;
  finish<<<blocks, 32 * kFinishWarps, 0, stream>>>(table, rows, quantum, out, report);
  check(cudaGetLastError(), "launch the end of the packed sums");
}

}  // namespace dsa::cuda
