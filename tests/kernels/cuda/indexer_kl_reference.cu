#include "tests/kernels/cuda/indexer_kl_reference.h"

#include <cuda_bf16.h>

#include <cmath>

#include "tests/support/cuda_device.h"

namespace dsa::test {
namespace {

__device__ double dot(const double* q, const __nv_bfloat16* k, int n) {
  double sum = 0;
  for (int d = 0; d < n; d += 8) {
    const uint4 word = *reinterpret_cast<const uint4*>(k + d);
    const auto* x = reinterpret_cast<const __nv_bfloat16*>(&word);
    for (int i = 0; i < 8; ++i) sum += q[d + i] * static_cast<double>(__bfloat162float(x[i]));
  }
  return sum;
}

__device__ double score(const AttentionMassParams& p, const double* q, int64_t h, int64_t s) {
  const auto* k = static_cast<const __nv_bfloat16*>(p.k) + s * p.k_stride + h * p.k_head_stride;
  const auto* rope = static_cast<const __nv_bfloat16*>(p.k_rope) + s * p.k_rope_stride;
  return (dot(q, k, 128) + dot(q + 128, rope, 64)) * static_cast<double>(p.scale);
}

__device__ void load_query(const AttentionMassParams& p, int64_t t, int64_t h, double* q) {
  __syncthreads();
  for (int d = threadIdx.x; d < 192; d += blockDim.x)
    q[d] = __bfloat162float((static_cast<const __nv_bfloat16*>(p.q) + t * p.q_stride + h * p.q_head_stride)[d]);
  __syncthreads();
}

__device__ int64_t begin_of(const AttentionMassParams& p, int64_t t) { return p.start ? max(p.start[t], 0) : 0; }
__device__ int64_t end_of(const AttentionMassParams& p, int64_t t) { return p.end ? min(static_cast<int64_t>(p.end[t]), p.keys) : p.keys; }

constexpr int kThreads = 256;

// One block a row and head.
__global__ void lse_of_rows(AttentionMassParams p, double* lse) {
  __shared__ double q[192], most[kThreads], sum[kThreads];
  const int64_t t = blockIdx.x, h = blockIdx.y;
  load_query(p, t, h, q);
  double m = -INFINITY, x = 0;
  for (int64_t s = begin_of(p, t) + threadIdx.x; s < end_of(p, t); s += kThreads) {
    const double y = score(p, q, h, s), n = fmax(m, y);
    x = x * exp(m - n) + exp(y - n);
    m = n;
  }
  most[threadIdx.x] = m, sum[threadIdx.x] = x;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double all = -INFINITY, total = 0;
  for (int i = 0; i < kThreads; ++i) all = fmax(all, most[i]);
  for (int i = 0; i < kThreads; ++i)
    if (sum[i] > 0) total += sum[i] * exp(most[i] - all);
  lse[t * p.heads + h] = all + log(total);
}

__global__ void mass_of_rows(AttentionMassParams p, const double* lse, const int64_t* rows, double* mass) {
  __shared__ double q[192];
  const int64_t t = rows[blockIdx.y], s = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool wanted = s < p.keys && s >= begin_of(p, t) && s < end_of(p, t);
  double sum = 0;
  for (int64_t h = 0; h < p.heads; ++h) {
    load_query(p, t, h, q);
    if (wanted) sum += exp(score(p, q, h, s) - lse[t * p.heads + h]);
  }
  if (s < p.keys) mass[blockIdx.y * p.keys + s] = sum;
}

}  // namespace

std::vector<double> reference_lse(const AttentionMassParams& p) {
  const DeviceArray<double> out(p.queries * p.heads);
  lse_of_rows<<<dim3(static_cast<unsigned>(p.queries), p.heads), kThreads>>>(p, out.data());
  cuda::check(cudaGetLastError(), "launch the reference of the log-sum-exp");
  return out.host();
}

std::vector<double> reference_mass(const AttentionMassParams& p, const std::vector<double>& lse, const std::vector<int64_t>& rows) {
  const DeviceArray<double> lse_d(lse), out(static_cast<int64_t>(rows.size()) * p.keys);
  const DeviceArray<int64_t> rows_d(rows);
  const dim3 grid(static_cast<unsigned>((p.keys + kThreads - 1) / kThreads), static_cast<unsigned>(rows.size()));
  mass_of_rows<<<grid, kThreads>>>(p, lse_d.data(), rows_d.data(), out.data());
  cuda::check(cudaGetLastError(), "launch the reference of the attention mass");
  return out.host();
}

ReferenceKl reference_kl(const double* mass, const float* logits, int64_t keys, int64_t begin, int64_t end, int all_heads,
                         const std::vector<int32_t>& selected, double weight) {
  ReferenceKl out;
  out.dI.assign(keys, 0.0);
  double most = -INFINITY, sum = 0;
  for (int64_t s = begin; s < end; ++s) most = std::fmax(most, logits[s]);
  for (int64_t s = begin; s < end; ++s) sum += std::exp(logits[s] - most);
  for (int64_t s = begin; s < end; ++s) {
    const double p = mass[s] / all_heads, log_q = logits[s] - most - std::log(sum), q = std::exp(log_q);
    if (p > 0) out.kl += p * (std::log(p) - log_q), out.entropy_target -= p * std::log(p);
    out.entropy_prediction -= q * log_q;
    out.dI[s] = weight * (q - p);
  }
  for (const int32_t s : selected) out.recall += mass[s] / all_heads;
  return out;
}

}  // namespace dsa::test
