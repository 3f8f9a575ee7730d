// Rotates and quantises rows of 128 bf16 values; see params.h for the formula and the order of the sums.
//
// Four lanes share a row, 32 values each: strides 1 to 16 of the butterfly stay inside a thread, 32 and 64 are shuffles.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/hadamard_quantise/params.h"

namespace dsa {
namespace {

constexpr int kThreads = 128, kEach = 32, kLanes = 4, kRows = kThreads / kLanes;

__device__ __forceinline__ float greater(float a, float b) {  // NaN if either is
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

template <bool kHadamard, bool kPowerOfTwo>
__global__ void __launch_bounds__(kThreads) hadamard_quantise(const HadamardQuantiseParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  if (row >= p.rows) return;
  const unsigned quad = 0xFu << (threadIdx.x % 32 / kLanes * kLanes);  // the row's lanes
  float y[kEach];
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.x) + row * p.x_stride + lane * kEach);
#pragma unroll
  for (int i = 0; i < kEach / 8; ++i) {
    const uint4 v = __ldcs(from + i);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      y[8 * i + 2 * j] = __uint_as_float(words[j] << 16);
      y[8 * i + 2 * j + 1] = __uint_as_float(words[j] & 0xFFFF0000u);
    }
  }
  if (kHadamard) {
#pragma unroll
    for (int h = 1; h < kEach; h *= 2)
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (!(i & h)) {
          const float a = y[i], b = y[i | h];
          y[i] = a + b;
          y[i | h] = a - b;
        }
#pragma unroll
    for (int h = 1; h < kLanes; h *= 2) {
      const float sign = lane & h ? -1.f : 1.f;
#pragma unroll
      for (int i = 0; i < kEach; ++i) y[i] = fmaf(sign, y[i], __shfl_xor_sync(quad, y[i], h));
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) y[i] = __bfloat162float(__float2bfloat16_rn(y[i] * 0.08838834764831845f));
  }
  float amax = 1e-4f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) amax = greater(amax, fabsf(y[i]));
#pragma unroll
  for (int h = 1; h < kLanes; h *= 2) amax = greater(amax, __shfl_xor_sync(quad, amax, h));
  float scale = __fdiv_rn(amax, 448.f), inverse = scale;
  if (kPowerOfTwo && amax < __builtin_huge_valf()) {
    const uint32_t bits = __float_as_uint(scale), exponent = (bits >> 23) + ((bits & 0x7FFFFFu) != 0);
    scale = __uint_as_float(exponent << 23);
    inverse = __uint_as_float((254u - exponent) << 23);
  }
  uint32_t codes[kEach / 4];
#pragma unroll
  for (int i = 0; i < kEach / 4; ++i) {
    float q[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) q[j] = kPowerOfTwo ? y[4 * i + j] * inverse : __fdiv_rn(y[4 * i + j], scale);
    const uint32_t low = __nv_cvt_float2_to_fp8x2({q[0], q[1]}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({q[2], q[3]}, __NV_SATFINITE, __NV_E4M3);
    codes[i] = low | high << 16;
  }
  uint4* to = reinterpret_cast<uint4*>(static_cast<char*>(p.codes) + row * 128 + lane * kEach);
  __stcs(to, make_uint4(codes[0], codes[1], codes[2], codes[3]));
  __stcs(to + 1, make_uint4(codes[4], codes[5], codes[6], codes[7]));
  if (lane == 0) p.scale[row] = scale;
}

}  // namespace

bool sm90_supports(const HadamardQuantiseParams& p, const char** why_not) {
  const auto no = [&](const char* why) { return *why_not = why, false; };
  if (!cuda::is_hopper()) return no("the current device is not of compute capability 9.0");
  if (p.rows < 0 || p.rows > int64_t{1} << 35) return no("more than 2^35 rows");
  if (p.x_stride % 8) return no("the row stride of x is not a multiple of 16 bytes");
  if (reinterpret_cast<uintptr_t>(p.x) % 16 || reinterpret_cast<uintptr_t>(p.codes) % 16) return no("x or codes is not 16-byte aligned");
  return true;
}

void launch_hadamard_quantise_sm90(const HadamardQuantiseParams& p) {
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot run hadamard_quantise for Hopper (") + why + ") choose another implementation");
  if (p.rows == 0) return;
  const auto kernel = p.hadamard ? (p.power_of_two ? hadamard_quantise<true, true> : hadamard_quantise<true, false>)
                                 : (p.power_of_two ? hadamard_quantise<false, true> : hadamard_quantise<false, false>);
  kernel<<<static_cast<unsigned>((p.rows + kRows - 1) / kRows), kThreads, 0, p.stream>>>(p);
  cuda::check(cudaGetLastError(), "launch hadamard_quantise");
}

}  // namespace dsa
