// See params.h. A CTA takes a row; bandwidth-bound: each logit is read once.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/cross_entropy/params.h"
#include "kernels/cuda/check.h"

namespace dsa {
namespace {

constexpr int kThreads = 256;

template <int n>
struct alignas(4 * n) Logits {
  float x[n];
};
template <int n>
struct alignas(2 * n) Rounded {
  __nv_bfloat16 x[n];
};

// A maximum and a sum of exponentials below it.
struct SumExp {
  float max = -INFINITY, sum = 0;

  __device__ void merge(const SumExp& other) {
    const float m = fmaxf(max, other.max);
    if (m == -INFINITY) {
      sum += other.sum;  // 0, or NaN
      return;
    }
    sum = sum * __expf(max - m) + other.sum * __expf(other.max - m);
    max = m;
  }
};

template <int n>
__global__ void __launch_bounds__(kThreads) statistics(const VocabTileParams p) {
  const int64_t row = blockIdx.x, packs = p.words / n;
  const Logits<n>* x = reinterpret_cast<const Logits<n>*>(p.logits + row * p.words);
  SumExp own;
  for (int64_t c = threadIdx.x; c < packs; c += kThreads) {
    const Logits<n> part = x[c];
    float m = own.max;
#pragma unroll
    for (int j = 0; j < n; ++j) m = fmaxf(m, part.x[j]);
    if (m > own.max) own.sum *= __expf(own.max - m), own.max = m;
#pragma unroll
    for (int j = 0; j < n; ++j) own.sum += __expf(part.x[j] - own.max);
  }
  for (int d = 16; d > 0; d /= 2) own.merge({__shfl_xor_sync(~0u, own.max, d), __shfl_xor_sync(~0u, own.sum, d)});
  __shared__ SumExp of_warp[kThreads / 32];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  SumExp all{p.max[row], p.sum_exp[row]};
  for (int i = 0; i < kThreads / 32; ++i) all.merge(of_warp[i]);
  p.max[row] = all.max;
  p.sum_exp[row] = all.sum;
  const int64_t column = p.target[row] - p.first;
  if (p.target[row] >= 0 && column >= 0 && column < p.words) p.target_logit[row] += p.logits[row * p.words + column];
}

template <int n>
__global__ void __launch_bounds__(kThreads) gradient(const VocabTileParams p) {
  const int64_t row = blockIdx.x, packs = p.words / n, target = p.target[row] < 0 ? -1 : p.target[row] - p.first;
  const Logits<n>* x = reinterpret_cast<const Logits<n>*>(p.logits + row * p.words);
  Rounded<n>* d = reinterpret_cast<Rounded<n>*>(static_cast<__nv_bfloat16*>(p.d) + row * p.words);
  const float lse = p.lse[row], g = p.grad[row];
  for (int64_t c = threadIdx.x; c < packs; c += kThreads) {
    const Logits<n> part = x[c];
    Rounded<n> out;
#pragma unroll
    for (int j = 0; j < n; ++j) out.x[j] = __float2bfloat16_rn((__expf(part.x[j] - lse) - (c * n + j == target ? 1.f : 0.f)) * g);
    d[c] = out;
  }
}

}  // namespace

void launch_vocab_tile_statistics(const VocabTileParams& p) {
  if (p.rows == 0 || p.words == 0) return;
  const unsigned rows = static_cast<unsigned>(p.rows);
  if (p.words % 4) statistics<1><<<rows, kThreads, 0, p.stream>>>(p);
  else statistics<4><<<rows, kThreads, 0, p.stream>>>(p);
  cuda::check(cudaGetLastError(), "sum a tile of the vocabulary");
}

void launch_vocab_tile_gradient(const VocabTileParams& p) {
  if (p.rows == 0 || p.words == 0) return;
  const unsigned rows = static_cast<unsigned>(p.rows);
  if (p.words % 4) gradient<1><<<rows, kThreads, 0, p.stream>>>(p);
  else gradient<4><<<rows, kThreads, 0, p.stream>>>(p);
  cuda::check(cudaGetLastError(), "differentiate a tile of the vocabulary");
}

}  // namespace dsa
