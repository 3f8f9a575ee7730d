// See params.h. Bandwidth-bound: eight channels a thread, or eight of either half.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/rope/params.h"

namespace dsa {
namespace {

constexpr int kThreads = 256, kWidth = 8;

struct alignas(16) Pack {
  __nv_bfloat162 x[kWidth / 2];
};

__device__ __forceinline__ float2 rotate(float a, float b, float cos, float sin) {
  return {a * cos - b * sin, b * cos + a * sin};
}

__device__ __forceinline__ void read(float (&v)[kWidth / 2], const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}

__global__ void __launch_bounds__(kThreads) rope_kernel(const RopeParams p, int64_t count) {
  const auto* const x = static_cast<const __nv_bfloat16*>(p.x);
  auto* const y = static_cast<__nv_bfloat16*>(p.y);
  const int half = p.dim / 2, pieces = p.halves ? half / kWidth : p.dim / kWidth;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    const int piece = static_cast<int>(i % pieces);
    const int64_t head = i / pieces % p.heads, row = i / pieces / p.heads;
    const __nv_bfloat16* const from = x + row * p.x_row + head * p.x_head + piece * kWidth;
    __nv_bfloat16* const to = y + row * p.y_row + head * p.y_head + piece * kWidth;
    const int64_t angle = row * half + piece * (p.halves ? kWidth : kWidth / 2);
    float cos[kWidth / 2], sin[kWidth / 2];
    if (p.halves) {
      Pack a = *reinterpret_cast<const Pack*>(from), b = *reinterpret_cast<const Pack*>(from + half);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        read(cos, p.cos + angle + part * kWidth / 2);
        read(sin, p.sin + angle + part * kWidth / 2);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int n = part * 2 + j;
          const float2 u = __bfloat1622float2(a.x[n]), v = __bfloat1622float2(b.x[n]);
          const float2 first = rotate(u.x, v.x, cos[2 * j], p.inverse ? -sin[2 * j] : sin[2 * j]);
          const float2 second = rotate(u.y, v.y, cos[2 * j + 1], p.inverse ? -sin[2 * j + 1] : sin[2 * j + 1]);
          a.x[n] = __floats2bfloat162_rn(first.x, second.x);
          b.x[n] = __floats2bfloat162_rn(first.y, second.y);
        }
      }
      *reinterpret_cast<Pack*>(to) = a;
      *reinterpret_cast<Pack*>(to + half) = b;
    } else {
      Pack a = *reinterpret_cast<const Pack*>(from);
      read(cos, p.cos + angle);
      read(sin, p.sin + angle);
#pragma unroll
      for (int j = 0; j < kWidth / 2; ++j) {
        const float2 u = __bfloat1622float2(a.x[j]), v = rotate(u.x, u.y, cos[j], p.inverse ? -sin[j] : sin[j]);
        a.x[j] = __floats2bfloat162_rn(v.x, v.y);
      }
      *reinterpret_cast<Pack*>(to) = a;
    }
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

bool rope_supports(const RopeParams& p, const char** why_not) {
  *why_not = nullptr;
  if (p.dim < 16 || p.dim % 16) *why_not = "the rotated channels are not a multiple of 16";
  else if (p.x_row % 8 || p.x_head % 8 || p.y_row % 8 || p.y_head % 8) *why_not = "a stride is not a multiple of 8";
  else if (!aligned(p.x) || !aligned(p.y) || !aligned(p.cos) || !aligned(p.sin)) *why_not = "a tensor is not 16-byte aligned";
  return !*why_not;
}

void launch_rope(const RopeParams& p) {
  const int64_t count = p.rows * p.heads * (p.halves ? p.dim / 2 : p.dim) / kWidth;
  if (count == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((count + kThreads - 1) / kThreads, int64_t{1} << 20));
  rope_kernel<<<blocks, kThreads, 0, p.stream>>>(p, count);
  cuda::check(cudaGetLastError(), "launch rope");
}

}  // namespace dsa
