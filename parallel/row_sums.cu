// See row_sums.h. A CTA makes one row of the result, 16 bytes a thread and step. Bandwidth-bound: every row is read and
// written once.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "parallel/row_sums_params.h"

namespace dsa {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ void narrow(float x, float& y) { y = x; }
__device__ void narrow(double x, double& y) { y = x; }

template <typename T, int n>
struct alignas(n * sizeof(T)) Pack {
  T x[n];
};

template <typename T, int n>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(int64_t packs, const Pack<T, n>* x, const int64_t* first, const int64_t* row,
                                                            const typename Wide<T>::type* weight, Pack<T, n>* out) {
  using W = typename Wide<T>::type;
  const int64_t t = blockIdx.x, begin = first[t], end = first[t + 1];
  for (int64_t c = threadIdx.x; c < packs; c += kThreads) {
    W sum[n] = {};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = row[i];
      const W w = weight ? weight[r] : W(1);
      const Pack<T, n> part = x[r * packs + c];
#pragma unroll
      for (int j = 0; j < n; ++j) sum[j] += w * widen(part.x[j]);
    }
    Pack<T, n> rounded;
#pragma unroll
    for (int j = 0; j < n; ++j) narrow(sum[j], rounded.x[j]);
    out[t * packs + c] = rounded;
  }
}

template <typename T, int n>
__global__ void __launch_bounds__(kThreads) scaled_rows_kernel(int64_t packs, const Pack<T, n>* g, const int64_t* of,
                                                               const typename Wide<T>::type* weight, const Pack<T, n>* y, Pack<T, n>* out,
                                                               typename Wide<T>::type* dot) {
  using W = typename Wide<T>::type;
  const int64_t m = blockIdx.x, from = of[m];
  const W w = weight[m];
  W sum = 0;
  for (int64_t c = threadIdx.x; c < packs; c += kThreads) {
    const Pack<T, n> left = g[from * packs + c], right = y[m * packs + c];
    Pack<T, n> scaled;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      sum += widen(left.x[j]) * widen(right.x[j]);
      narrow(w * widen(left.x[j]), scaled.x[j]);
    }
    out[m * packs + c] = scaled;
  }
  __shared__ W of_warp[kThreads / 32];
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / 32; ++i) sum += of_warp[i];
  dot[m] = sum;
}

// f.run<T, elements at once>(): 16 bytes at once, or one element where rows are no multiple of that.
template <typename T, typename F>
void by_width(int64_t width, F f) {
  constexpr int n = 16 / sizeof(T);
  if (width % n) f.template run<T, 1>();
  else f.template run<T, n>();
}
template <typename F>
void by_type(RowType type, int64_t width, F f) {
  if (type == RowType::BF16) by_width<__nv_bfloat16>(width, f);
  else if (type == RowType::FP32) by_width<float>(width, f);
  else by_width<double>(width, f);
}

struct RowSums {
  const RowSumsParams& p;
  template <typename T, int n>
  void run() const {
    row_sums_kernel<T, n><<<static_cast<unsigned>(p.targets), kThreads, 0, p.stream>>>(
        p.width / n, static_cast<const Pack<T, n>*>(p.x), p.first, p.row, static_cast<const typename Wide<T>::type*>(p.weight),
        static_cast<Pack<T, n>*>(p.out));
  }
};

struct ScaledRows {
  const ScaledRowsParams& p;
  template <typename T, int n>
  void run() const {
    using W = typename Wide<T>::type;
    scaled_rows_kernel<T, n><<<static_cast<unsigned>(p.rows), kThreads, 0, p.stream>>>(
        p.width / n, static_cast<const Pack<T, n>*>(p.g), p.of, static_cast<const W*>(p.weight), static_cast<const Pack<T, n>*>(p.y),
        static_cast<Pack<T, n>*>(p.out), static_cast<W*>(p.dot));
  }
};

void check(const char* what) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("cannot ") + what + " (CUDA says " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status) +
                             ") an earlier kernel may have failed; run under compute-sanitizer");
}

}  // namespace

void launch_row_sums(const RowSumsParams& p) {
  if (p.targets == 0 || p.width == 0) return;
  by_type(p.type, p.width, RowSums{p});
  check("add rows");
}

void launch_scaled_rows(const ScaledRowsParams& p) {
  if (p.rows == 0) return;
  by_type(p.type, p.width, ScaledRows{p});
  check("scale rows");
}

}  // namespace dsa
