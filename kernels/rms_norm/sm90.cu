// See params.h. One thread block a row at a time; the row stays in registers, 8 elements a thread and step.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/rms_norm/params.h"

namespace dsa {
namespace {

constexpr int kThreads = 256, kWidth = 8, kSteps = 4;  // 256 * 8 * 4 = 8192 channels

struct alignas(16) Pack {
  __nv_bfloat162 x[kWidth / 2];
};

// The sum over the thread block, on every thread. Called twice a row at most: two buffers suffice.
__device__ float block_sum(float v, float* buffer) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += buffer[i];
  __syncthreads();
  return sum;
}

__device__ void unpack(const Pack& p, float* v) {
#pragma unroll
  for (int j = 0; j < kWidth / 2; ++j) {
    const float2 f = __bfloat1622float2(p.x[j]);
    v[2 * j] = f.x;
    v[2 * j + 1] = f.y;
  }
}

__device__ Pack pack(const float* v) {
  Pack p;
#pragma unroll
  for (int j = 0; j < kWidth / 2; ++j) p.x[j] = __floats2bfloat162_rn(v[2 * j], v[2 * j + 1]);
  return p;
}

__global__ void __launch_bounds__(kThreads) forward_kernel(RmsNormParams p) {
  __shared__ float buffer[kThreads / 32];
  const int packs = p.dim / kWidth;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const Pack* x = reinterpret_cast<const Pack*>(static_cast<const __nv_bfloat16*>(p.x) + row * p.x_stride);
    float v[kSteps][kWidth], sum = 0;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int i = s * kThreads + threadIdx.x;
      if (i >= packs) break;
      unpack(x[i], v[s]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += v[s][j] * v[s][j];
    }
    const float r = rsqrtf(block_sum(sum, buffer) / static_cast<float>(p.dim) + p.eps);
    if (threadIdx.x == 0 && p.r) p.r[row] = r;
    Pack* y = reinterpret_cast<Pack*>(static_cast<__nv_bfloat16*>(p.y) + row * p.dim);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int i = s * kThreads + threadIdx.x;
      if (i >= packs) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v[s][j] = v[s][j] * r * p.w[i * kWidth + j];
      y[i] = pack(v[s]);
    }
  }
}

__global__ void __launch_bounds__(kThreads) backward_kernel(RmsNormParams p) {
  __shared__ float buffer[kThreads / 32];
  const int packs = p.dim / kWidth;
  float dw[kSteps][kWidth] = {};
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const Pack* x = reinterpret_cast<const Pack*>(static_cast<const __nv_bfloat16*>(p.x) + row * p.x_stride);
    const Pack* dy = reinterpret_cast<const Pack*>(static_cast<const __nv_bfloat16*>(p.dy) + row * p.dim);
    const float r = p.r[row];
    float n[kSteps][kWidth], g[kSteps][kWidth], sum = 0;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int i = s * kThreads + threadIdx.x;
      if (i >= packs) break;
      unpack(x[i], n[s]);
      unpack(dy[i], g[s]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        n[s][j] *= r;
        dw[s][j] += g[s][j] * n[s][j];
        g[s][j] *= p.w[i * kWidth + j];
        sum += g[s][j] * n[s][j];
      }
    }
    if (!p.dx) continue;
    const float mean = block_sum(sum, buffer) / static_cast<float>(p.dim);
    Pack* dx = reinterpret_cast<Pack*>(static_cast<__nv_bfloat16*>(p.dx) + row * p.dim);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int i = s * kThreads + threadIdx.x;
      if (i >= packs) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) g[s][j] = r * (g[s][j] - n[s][j] * mean);
      dx[i] = pack(g[s]);
    }
  }
  if (!p.dw_parts) return;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int i = s * kThreads + threadIdx.x;
    if (i >= packs) break;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) p.dw_parts[int64_t{blockIdx.x} * p.dim + i * kWidth + j] = dw[s][j];
  }
}

}  // namespace

bool rms_norm_supports(const RmsNormParams& p, const char** why_not) {
  *why_not = nullptr;
  if (p.dim % kWidth || p.dim > kThreads * kWidth * kSteps) *why_not = "channels must be a multiple of 8, at most 8192";
  else if (p.x_stride % kWidth || reinterpret_cast<uintptr_t>(p.x) % 16) *why_not = "rows must be 16-byte aligned";
  return !*why_not;
}

void launch_rms_norm_forward(const RmsNormParams& p) {
  if (p.rows == 0) return;
  forward_kernel<<<static_cast<int>(std::min<int64_t>(p.rows, 132 * 8)), kThreads, 0, p.stream>>>(p);
  cuda::check(cudaGetLastError(), "run rms_norm");
}

void launch_rms_norm_backward(const RmsNormParams& p) {
  backward_kernel<<<p.parts, kThreads, 0, p.stream>>>(p);
  cuda::check(cudaGetLastError(), "run rms_norm backward");
}

}  // namespace dsa
