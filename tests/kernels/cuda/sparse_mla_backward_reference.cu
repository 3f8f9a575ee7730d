#include "tests/kernels/cuda/sparse_mla_backward_reference.h"

#include <cuda_bf16.h>

#include "kernels/cuda/check.h"
#include "tests/support/cuda_device.h"

namespace dsa::test {
namespace {

// One warp a (pair, head).
__global__ void add_pairs(const SparseMlaBackwardParams p, const ListedPair* pairs, int64_t n, double* out) {
  const int64_t item = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (item >= n * p.heads) return;
  const ListedPair pair = pairs[item / p.heads];
  const int64_t th = int64_t{pair.t} * p.heads + item % p.heads;
  const auto* q = static_cast<const __nv_bfloat16*>(p.q) + th * 576;
  const auto* g = static_cast<const __nv_bfloat16*>(p.d_o) + th * 512;
  const auto* kv = static_cast<const __nv_bfloat16*>(p.kv) + int64_t{pair.key} * p.kv_stride;
  double s = 0, dp = 0;
  for (int c = lane; c < 576; c += 32) {
    const double k = __bfloat162float(kv[c]);
    s += k * __bfloat162float(q[c]);
    if (c < 512) dp += k * __bfloat162float(g[c]);
  }
  for (int bit = 16; bit > 0; bit /= 2) s += __shfl_xor_sync(~0u, s, bit), dp += __shfl_xor_sync(~0u, dp, bit);
  const double weight = exp(s * p.scale - p.lse[th]), slope = weight * (dp - p.delta[th]) * p.scale;
  for (int c = lane; c < 576; c += 32)
    atomicAdd(out + int64_t{pair.sample} * 576 + c, slope * __bfloat162float(q[c]) + (c < 512 ? weight * __bfloat162float(g[c]) : 0));
}

__global__ void count_differing(const uint32_t* a, const uint32_t* b, int64_t n, unsigned long long* count) {
  unsigned long long own = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{blockDim.x} * gridDim.x) own += a[i] != b[i];
  if (own) atomicAdd(count, own);
}

}  // namespace

int64_t differing_words(const void* a, const void* b, int64_t n) {
  const DeviceArray<unsigned long long> count(1);
  count.fill_bytes(0);
  count_differing<<<1056, 256>>>(static_cast<const uint32_t*>(a), static_cast<const uint32_t*>(b), n, count.data());
  cuda::check(cudaGetLastError(), "launch the comparison");
  return static_cast<int64_t>(count.host()[0]);
}

void reference_dkv_of_pairs(const SparseMlaBackwardParams& p, const std::vector<ListedPair>& pairs, double* out) {
  if (pairs.empty()) return;
  const DeviceArray<ListedPair> on_device(pairs);
  const int64_t warps = on_device.size() * p.heads;
  add_pairs<<<static_cast<unsigned>((warps + 7) / 8), 256>>>(p, on_device.data(), on_device.size(), out);
  cuda::check(cudaGetLastError(), "launch the reference sums of keys");
  cuda::check(cudaDeviceSynchronize(), "run the reference sums of keys");
}

}  // namespace dsa::test
