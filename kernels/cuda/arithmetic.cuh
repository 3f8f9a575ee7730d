// Single instructions that CUDA's functions surround with more.
#pragma once

#include <cstdint>

namespace dsa::cuda {

/// 2^x, 2 units in the last place, results below the smallest normal number as 0 (PTX ISA, ex2.approx.ftz).
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The bf16 in the lower and in the upper half of a register.
__device__ __forceinline__ float low_half(uint32_t two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high_half(uint32_t two) { return __uint_as_float(two & 0xFFFF0000u); }

}  // namespace dsa::cuda
