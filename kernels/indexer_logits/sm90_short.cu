// Scores of e4m3 rows that see few keys (see params.h): the e4m3 tensor instructions keep about 14 bits of a sum of 32 products,
// which shows where a row has too few keys for its errors to average out. e4m3 is exact in fp16, a product of two exact in
// fp32, and the fp16 instructions (m16n8k16) sum in fp32.
//
// A block looks at 32 rows at once for short ones, and takes these one by one: a row's queries become fp16 in shared memory, in the order in which lanes need them; a warp takes
// 32 keys, read straight from memory. The sum over dimensions may take them in any order: a lane l of four takes dimensions
// 32l to 32l + 31, four to an instruction, of keys and queries alike.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/indexer_logits/sm90_kernel.cuh"

namespace dsa::indexer_logits_sm90 {
namespace {

constexpr int kHeads = 64, kWarps = 8, kWarpKeys = 32;

/// Two e4m3 as two fp16, exactly.
__device__ __forceinline__ uint32_t widen(uint32_t two) {
  uint32_t x;
  asm("{\n .reg .b16 low;\n cvt.u16.u32 low, %1;\n cvt.rn.f16x2.e4m3x2 %0, low;\n}" : "=r"(x) : "r"(two));
  return x;
}

// 16 bytes from byte `at` of a row of dim bytes, zeros behind its end.
__device__ __forceinline__ uint4 load16(const uint8_t* row, int at, int dim) {
  return at < dim ? __ldg(reinterpret_cast<const uint4*>(row + at)) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ uint32_t word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

__device__ __forceinline__ void multiply16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

using Queries = uint4[kHeads / 8][4][32];  // [eight heads][two instructions][lane]

__device__ __forceinline__ void score_row(const uint8_t* q, const uint8_t* k, int64_t k_stride, int dim, const Arguments& a, int64_t t,
                                          Range range, Queries& queries) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  __syncthreads();  // the row before has read its queries
  {
    const int head = 8 * warp + row;
    const uint8_t* from = q + head * dim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 codes = head < a.heads ? load16(from, 32 * quad + 16 * half, dim) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t first = word(codes, 2 * i), second = word(codes, 2 * i + 1);
        queries[warp][2 * half + i][lane] = make_uint4(widen(first), widen(first >> 16), widen(second), widen(second >> 16));
      }
    }
  }
  float2 w[kHeads / 8];  // of heads 8b + 2 quad and the next
#pragma unroll
  for (int b = 0; b < kHeads / 8; ++b) {
    const int j = 8 * b + 2 * quad;
    w[b].x = j < a.heads ? __ldg(a.w + t * a.w_stride + j) : 0.f;
    w[b].y = j + 1 < a.heads ? __ldg(a.w + t * a.w_stride + j + 1) : 0.f;
  }
  __syncthreads();
  for (int first = range.begin + warp * kWarpKeys; first < range.end; first += kWarps * kWarpKeys) {
    uint4 codes[4][2];  // of keys first + row + 8i
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = k + min(first + row + 8 * i, range.end - 1) * k_stride;
      codes[i][0] = load16(from, 32 * quad, dim), codes[i][1] = load16(from, 32 * quad + 16, dim);
    }
    float even[4] = {}, odd[4] = {};  // even and odd heads apart, as everywhere
#pragma unroll
    for (int b = 0; b < kHeads / 8; ++b) {
      float d[2][4] = {};
#pragma unroll
      for (int two = 0; two < 4; ++two) {
        const uint4 x = queries[b][two][lane];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t low = word(codes[2 * m][two / 2], two % 2 * 2 + i), high = word(codes[2 * m + 1][two / 2], two % 2 * 2 + i);
            const uint32_t keys[4] = {widen(low), widen(high), widen(low >> 16), widen(high >> 16)};
            multiply16(d[m], keys, i ? x.z : x.x, i ? x.w : x.y);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        even[i] = fmaf(fmaxf(d[i / 2][i % 2 * 2], 0.f), w[b].x, even[i]);
        odd[i] = fmaf(fmaxf(d[i / 2][i % 2 * 2 + 1], 0.f), w[b].y, odd[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = even[i] + odd[i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int s = first + row + 8 * i;
      if (quad == 0 && s < range.end) a.logits[t * a.logits_stride + s] = sum * (a.k_scale ? __ldg(a.k_scale + s) : 1.f);
    }
  }
}

__global__ void __launch_bounds__(kWarps * 32)
    score_short(const uint8_t* q, int64_t q_stride, const uint8_t* k, int64_t k_stride, int dim, const Arguments a) {
  __shared__ Queries queries;
  const int lane = threadIdx.x % 32;
  for (int64_t base = blockIdx.x; base < a.queries; base += 32 * gridDim.x) {
    const int64_t own = base + int64_t{lane} * gridDim.x;
    const Range looked_at = own < a.queries ? whole_range(a, own) : Range{0, 0};
    const uint32_t few = __ballot_sync(~0u, looked_at.begin < looked_at.end && looked_at.end - looked_at.begin < kFewKeys);
    for (uint32_t rest = few; rest != 0; rest &= rest - 1) {
      const int64_t t = base + int64_t{__ffs(rest) - 1} * gridDim.x;
      score_row(q + t * q_stride, k, k_stride, dim, a, t, whole_range(a, t), queries);
    }
  }
}

}  // namespace

void launch_short_e4m3(const IndexerLogitsParams& p, const Arguments& a) {
  const auto blocks = static_cast<int>(std::min<int64_t>(p.queries, cuda::multiprocessors()));
  score_short<<<blocks, kWarps * 32, 0, p.stream>>>(static_cast<const uint8_t*>(p.q), p.q_stride, static_cast<const uint8_t*>(p.k),
                                                    p.k_stride, p.dim, a);
  cuda::check(cudaGetLastError(), "launch the short rows of indexer_logits");
}

}  // namespace dsa::indexer_logits_sm90
