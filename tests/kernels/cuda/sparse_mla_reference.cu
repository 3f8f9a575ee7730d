#include "tests/kernels/cuda/sparse_mla_reference.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <random>
#include <thread>

#include "kernels/cuda/check.h"
#include "tests/support/cuda_device.h"

namespace dsa::test {
namespace {

constexpr int kThreads = 256;

__device__ double block_sum(double x, double* memory) {
  __syncthreads();
  memory[threadIdx.x] = x;
  __syncthreads();
  for (int n = kThreads / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) memory[threadIdx.x] += memory[threadIdx.x + n];
    __syncthreads();
  }
  return memory[0];
}

// One block a (query, head).
__global__ void attend(const SparseMlaParams p, const SparseMlaReference r) {
  __shared__ double weight[4096], memory[kThreads], q[576], g[512];
  __shared__ int key[4096];
  const int64_t t = blockIdx.x / p.heads, th = blockIdx.x;
  const int h = blockIdx.x % p.heads;
  const auto* query = static_cast<const __nv_bfloat16*>(p.q) + t * p.q_stride + h * 576;
  const auto* kv = static_cast<const __nv_bfloat16*>(p.kv);
  const int length = p.lengths ? min(max(p.lengths[t], 0), p.k) : p.k;
  for (int c = threadIdx.x; c < 576; c += kThreads) q[c] = __bfloat162float(query[c]);
  if (r.d_o)
    for (int c = threadIdx.x; c < 512; c += kThreads)
      g[c] = __bfloat162float(static_cast<const __nv_bfloat16*>(r.d_o)[th * 512 + c]);
  for (int i = threadIdx.x; i < length; i += kThreads) {
    const int s = p.indices[t * p.indices_stride + i];
    key[i] = s >= 0 && s < p.keys && (i == 0 || s > p.indices[t * p.indices_stride + i - 1]) ? s : -1;
  }
  __syncthreads();
  double sum = 0;
  for (int i = threadIdx.x; i < length; i += kThreads) {
    double x = 0;
    if (key[i] >= 0)
      for (int c = 0; c < 576; ++c) x += q[c] * double(__bfloat162float(kv[key[i] * p.kv_stride + c]));
    weight[i] = key[i] >= 0 ? exp(x * p.scale) : 0;
    sum += weight[i];
  }
  sum = block_sum(sum, memory);
  for (int i = threadIdx.x; i < length; i += kThreads) weight[i] = sum > 0 ? weight[i] / sum : 0;
  __syncthreads();
  if (threadIdx.x == 0) r.lse[th] = sum > 0 ? log(sum) : -INFINITY;
  double delta = 0;
  for (int c = threadIdx.x; c < 512; c += kThreads) {
    double x = 0;
    for (int i = 0; i < length; ++i)
      if (key[i] >= 0) x += weight[i] * double(__bfloat162float(kv[key[i] * p.kv_stride + c]));
    r.o[th * 512 + c] = x;
    if (r.d_o) delta += x * g[c];
  }
  if (!r.d_o) return;
  delta = block_sum(delta, memory);
  __shared__ double ds[4096];
  for (int i = threadIdx.x; i < length; i += kThreads) {
    double x = 0;
    if (key[i] >= 0)
      for (int c = 0; c < 512; ++c) x += g[c] * double(__bfloat162float(kv[key[i] * p.kv_stride + c]));
    ds[i] = weight[i] * (x - delta) * p.scale;
    atomicAdd(&r.p_sel[t * p.k + i], weight[i] / p.heads);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < 576; c += kThreads) {
    double x = 0;
    for (int i = 0; i < length; ++i)
      if (key[i] >= 0) {
        x += ds[i] * double(__bfloat162float(kv[key[i] * p.kv_stride + c]));
        atomicAdd(&r.dkv[int64_t{key[i]} * 576 + c], ds[i] * q[c] + (c < 512 ? weight[i] * g[c] : 0));
      }
    r.dq[th * 576 + c] = x;
  }
}

// sums: |got - want|^2, |want|^2, |got|^2, got . want
template <class T>
__global__ void compare(const T* got, const double* want, int64_t n, double* sums) {
  __shared__ double memory[kThreads];
  double x[4] = {};
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < n; i += int64_t{kThreads} * gridDim.x) {
    const double a = static_cast<float>(got[i]), b = want[i];
    x[0] += (a - b) * (a - b), x[1] += b * b, x[2] += a * a, x[3] += a * b;
  }
  for (int j = 0; j < 4; ++j) {
    const double s = block_sum(x[j], memory);
    if (threadIdx.x == 0) atomicAdd(sums + j, s);
  }
}

template <class T>
std::vector<double> sums_of(const T* got, const double* want, int64_t n) {
  const DeviceArray<double> sums(4);
  sums.fill_bytes(0);
  compare<<<256, kThreads>>>(got, want, n, sums.data());
  cuda::check(cudaGetLastError(), "launch the comparison");
  return sums.host();
}

}  // namespace

void reference_sparse_mla(const SparseMlaParams& p, const SparseMlaReference& r) {
  attend<<<static_cast<int>(p.queries * p.heads), kThreads>>>(p, r);
  cuda::check(cudaGetLastError(), "launch the reference attention");
  cuda::check(cudaDeviceSynchronize(), "run the reference attention");
}

double relative_error(const float* got, const double* want, int64_t n) {
  const auto s = sums_of(got, want, n);
  return std::sqrt(s[0] / s[1]);
}
double relative_error_bf16(const void* got, const double* want, int64_t n) {
  const auto s = sums_of(static_cast<const __nv_bfloat16*>(got), want, n);
  return std::sqrt(s[0] / s[1]);
}
double cosine_distance_bf16(const void* got, const double* want, int64_t n) {
  const auto s = sums_of(static_cast<const __nv_bfloat16*>(got), want, n);
  return 1 - s[3] / std::sqrt(s[1] * s[2]);
}

void make_lists(Lists kind, int64_t rows, int64_t keys, int k, uint32_t seed, std::vector<int32_t>& indices,
                std::vector<int32_t>& lengths) {
  indices.assign(rows * k, -1);
  lengths.assign(rows, 0);
  std::mt19937 shared_random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> shared(kind == Lists::SHARED ? keys : 0);
  for (float& x : shared) x = normal(shared_random);
  std::vector<float> noise(1 << 16);
  for (float& x : noise) x = 0.3f * normal(shared_random);
  std::atomic<int64_t> next{0};
  const auto fill = [&] {
    std::vector<std::pair<float, int32_t>> best;
    std::vector<uint8_t> taken;
    for (int64_t t; (t = next++) < rows;) {
      const int64_t seen = keys - rows + t + 1;
      int32_t* row = &indices[t * k];
      if (seen <= k) {
        for (int64_t s = 0; s < seen; ++s) row[s] = s;
        lengths[t] = seen;
        continue;
      }
      std::mt19937 random(seed * 7919 + t);
      lengths[t] = k;
      if (kind == Lists::SHARED) {
        best.resize(seen);
        const uint32_t shift = random() | 1;
        for (int64_t s = 0; s < seen; ++s)
          best[s] = {-(shared[s] + noise[static_cast<uint32_t>((s + t * 977) * shift) >> 16]), static_cast<int32_t>(s)};
        std::nth_element(best.begin(), best.begin() + k, best.end());
        for (int i = 0; i < k; ++i) row[i] = best[i].second;
      } else {
        taken.assign(seen, 0);
        int count = 0;
        const int64_t near = std::min<int64_t>(8192, seen);
        while (count < k) {
          const bool recent = kind == Lists::LOCAL && count < k / 2 && near > k / 2;
          const int64_t s = recent ? seen - 1 - random() % near : random() % seen;
          if (!taken[s]) taken[s] = 1, row[count++] = s;
        }
      }
      std::sort(row, row + k);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) threads.emplace_back(fill);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace dsa::test
