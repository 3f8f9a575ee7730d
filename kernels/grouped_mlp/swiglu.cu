// See params.h. Bandwidth-bound: 8 elements a thread and step.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/check.h"
#include "kernels/grouped_mlp/params.h"

namespace dsa {
namespace {

constexpr int kThreads = 256, kWidth = 8;

struct alignas(16) Pack {
  __nv_bfloat162 x[kWidth / 2];
};

__device__ float sigmoid(float g) { return 1.0f / (1.0f + __expf(-g)); }

template <bool kBackward>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(int64_t packs, const Pack* g_in, const Pack* u_in, Pack* a_out,
                                                          const Pack* da_in, Pack* dg_out, Pack* du_out) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < packs; i += int64_t{gridDim.x} * kThreads) {
    const Pack g8 = g_in[i], u8 = u_in[i];
    Pack a8, da8, dg8, du8;
    if (kBackward) da8 = da_in[i];
#pragma unroll
    for (int j = 0; j < kWidth / 2; ++j) {
      const float2 g = __bfloat1622float2(g8.x[j]), u = __bfloat1622float2(u8.x[j]);
      const float2 sig = {sigmoid(g.x), sigmoid(g.y)};
      const float2 silu = {g.x * sig.x, g.y * sig.y};
      a8.x[j] = __floats2bfloat162_rn(silu.x * u.x, silu.y * u.y);
      if (kBackward) {
        const float2 da = __bfloat1622float2(da8.x[j]);
        du8.x[j] = __floats2bfloat162_rn(da.x * silu.x, da.y * silu.y);
        dg8.x[j] = __floats2bfloat162_rn(da.x * u.x * (sig.x + silu.x * (1.0f - sig.x)),
                                         da.y * u.y * (sig.y + silu.y * (1.0f - sig.y)));
      }
    }
    if (a_out) a_out[i] = a8;
    if (kBackward) {
      dg_out[i] = dg8;
      du_out[i] = du8;
    }
  }
}

}  // namespace

void launch_swiglu(const SwigluParams& p) {
  if (p.elements == 0) return;
  const int64_t packs = p.elements / kWidth;
  const int grid = static_cast<int>(std::min<int64_t>((packs + kThreads - 1) / kThreads, 132 * 16));
  const auto in = [](const void* x) { return static_cast<const Pack*>(x); };
  const auto out = [](void* x) { return static_cast<Pack*>(x); };
  if (p.da)
    swiglu_kernel<true><<<grid, kThreads, 0, p.stream>>>(packs, in(p.g), in(p.u), out(p.a), in(p.da), out(p.dg), out(p.du));
  else
    swiglu_kernel<false><<<grid, kThreads, 0, p.stream>>>(packs, in(p.g), in(p.u), out(p.a), nullptr, nullptr, nullptr);
  cuda::check(cudaGetLastError(), "run swiglu");
}

}  // namespace dsa
