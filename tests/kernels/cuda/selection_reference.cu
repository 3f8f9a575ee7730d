#include "tests/kernels/cuda/selection_reference.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/support/cuda_device.h"

namespace dsa::test {
namespace {

__device__ double element(const void* p, int64_t i, bool fp8) {
  if (fp8) {
    __nv_fp8_e4m3 x;
    x.__x = static_cast<const __nv_fp8_storage_t*>(p)[i];
    return static_cast<float>(x);
  }
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
}

__global__ void logits(IndexerLogitsParams p, const int64_t* rows, double* out, double* magnitude) {
  const int64_t t = rows[blockIdx.y], s = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (s >= p.keys) return;
  const bool fp8 = p.dtype == IndexerDtype::E4M3;
  double sum = nan(""), size = 0;
  if (s >= (p.start ? p.start[t] : 0) && s < (p.end ? p.end[t] : p.keys)) {
    sum = 0;
    for (int j = 0; j < p.heads; ++j) {
      double dot = 0;
      for (int d = 0; d < p.dim; ++d)
        dot += element(p.q, t * p.q_stride + j * p.dim + d, fp8) * element(p.k, s * p.k_stride + d, fp8);
      sum += p.w[t * p.w_stride + j] * fmax(dot, 0.0);
      size += fabs(p.w[t * p.w_stride + j]) * fmax(dot, 0.0);
    }
    if (p.k_scale) sum *= p.k_scale[s], size *= fabs(p.k_scale[s]);
  }
  out[blockIdx.y * p.keys + s] = sum;
  magnitude[blockIdx.y * p.keys + s] = size;
}

}  // namespace

ReferenceLogits reference_logits(const IndexerLogitsParams& p, const std::vector<int64_t>& rows) {
  const DeviceArray<int64_t> chosen(rows);
  const DeviceArray<double> out(static_cast<int64_t>(rows.size()) * p.keys), magnitude(out.size());
  const dim3 grid(static_cast<unsigned>((p.keys + 127) / 128), static_cast<unsigned>(rows.size()));
  logits<<<grid, 128>>>(p, chosen.data(), out.data(), magnitude.data());
  cuda::check(cudaGetLastError(), "launch the reference of indexer_logits");
  return {out.host(), magnitude.host()};
}

std::vector<int32_t> reference_top_k(const float* scores, int64_t begin, int64_t end, int64_t k) {
  std::vector<int32_t> order;
  for (int64_t s = begin; s < end; ++s)
    if (scores[s] > -std::numeric_limits<float>::infinity()) order.push_back(static_cast<int32_t>(s));
  const auto better = [&](int32_t a, int32_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; };
  if (static_cast<int64_t>(order.size()) > k) {
    std::nth_element(order.begin(), order.begin() + k, order.end(), better);
    order.resize(k);
  }
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace dsa::test
