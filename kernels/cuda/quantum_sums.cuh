// The end of fixed-quantum sums (sparse_mla's dkv, indexer_kl's dk): rows of fp32 sums whose columns stand, 16 by 16, in the
// order in which the accumulators of four neighbouring lanes hold them, become rows in natural order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/check.h"

namespace dsa::cuda {

// A thread takes 16 columns: sums (0,1 | 8,9), (2,3 | 10,11), (4,5 | 12,13), (6,7 | 14,15).
template <bool kBf16>
__global__ void finish_quantum_sums(const float4* sums, int64_t groups, void* rows, unsigned* amax) {
  float greatest = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < groups; i += int64_t{blockDim.x} * gridDim.x) {
    float column[16];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 v = sums[4 * i + q];
      column[2 * q] = v.x, column[2 * q + 1] = v.y, column[8 + 2 * q] = v.z, column[8 + 2 * q + 1] = v.w;
      greatest = fmaxf(fmaxf(greatest, fmaxf(fabsf(v.x), fabsf(v.y))), fmaxf(fabsf(v.z), fabsf(v.w)));
    }
    if constexpr (kBf16) {
      alignas(16) __nv_bfloat162 out[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) out[j] = __floats2bfloat162_rn(column[2 * j], column[2 * j + 1]);
      auto* to = static_cast<uint4*>(rows) + 2 * i;
      to[0] = reinterpret_cast<const uint4*>(out)[0];
      to[1] = reinterpret_cast<const uint4*>(out)[1];
    } else {
      auto* to = static_cast<float4*>(rows) + 4 * i;
#pragma unroll
      for (int j = 0; j < 4; ++j) to[j] = make_float4(column[4 * j], column[4 * j + 1], column[4 * j + 2], column[4 * j + 3]);
    }
  }
  for (int bit = 16; bit > 0; bit /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, bit));
  if (threadIdx.x % 32 == 0) atomicMax(amax, __float_as_uint(greatest));
}

/// elements: a multiple of 16. Writes them as bf16 or fp32, and the greatest magnitude to amax (one fp32 on the device).
inline void launch_finish_quantum_sums(const float* sums, int64_t elements, void* rows, bool bf16, float* amax, cudaStream_t stream) {
  check(cudaMemsetAsync(amax, 0, sizeof(float), stream), "clear the greatest magnitude");
  if (elements == 0) return;
  const int64_t groups = elements / 16;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((groups + 255) / 256, 2112));
  (bf16 ? finish_quantum_sums<true> : finish_quantum_sums<false>)<<<blocks, 256, 0, stream>>>(
      reinterpret_cast<const float4*>(sums), groups, rows, reinterpret_cast<unsigned*>(amax));
  check(cudaGetLastError(), "launch the end of the fixed-quantum sums");
}

}  // namespace dsa::cuda
