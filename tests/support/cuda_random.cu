#include "tests/support/cuda_random.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "kernels/cuda/check.h"

namespace dsa::test {
namespace {

__device__ uint32_t hash(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ x >> 27) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>((x ^ x >> 31) >> 32);
}

__device__ float normal(uint64_t seed, int64_t i) {
  const float u = (hash(seed * 0x632BE59BD9B4E019ull + 2 * i) + 0.5f) * 0x1p-32f;
  const float v = hash(seed * 0x632BE59BD9B4E019ull + 2 * i + 1) * 0x1p-32f;
  return sqrtf(-2.f * logf(fminf(u, 0.99999994f))) * cospif(2.f * v);
}

template <class Store>
__global__ void fill(int64_t n, uint64_t seed, Store store) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{blockDim.x} * gridDim.x)
    store(i, normal(seed, i));
}

struct StoreF32 {
  float* out;
  float mean, deviation;
  __device__ void operator()(int64_t i, float x) const { out[i] = mean + deviation * x; }
};
struct StoreBf16 {
  __nv_bfloat16* out;
  float deviation;
  __device__ void operator()(int64_t i, float x) const { out[i] = __float2bfloat16_rn(deviation * x); }
};
struct StoreE4m3 {
  __nv_fp8_storage_t* out;
  float deviation;
  __device__ void operator()(int64_t i, float x) const {
    out[i] = __nv_cvt_float_to_fp8(deviation * x, __NV_SATFINITE, __NV_E4M3);
  }
};

template <class Store>
void launch(int64_t n, uint64_t seed, Store store) {
  if (n > 0) fill<<<1056, 256>>>(n, seed, store);
  cuda::check(cudaGetLastError(), "launch the random fill");
}

}  // namespace

void fill_normal_f32(float* out, int64_t n, uint64_t seed, float mean, float deviation) {
  launch(n, seed, StoreF32{out, mean, deviation});
}
void fill_normal_bf16(void* out, int64_t n, uint64_t seed, float deviation) {
  launch(n, seed, StoreBf16{static_cast<__nv_bfloat16*>(out), deviation});
}
void fill_normal_e4m3(void* out, int64_t n, uint64_t seed, float deviation) {
  launch(n, seed, StoreE4m3{static_cast<__nv_fp8_storage_t*>(out), deviation});
}

}  // namespace dsa::test
