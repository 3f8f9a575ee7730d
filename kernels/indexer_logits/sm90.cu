// What the Hopper kernel of indexer_logits accepts, its tensor maps, and the -inf outside a row's range.
#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/indexer_logits/sm90_kernel.cuh"

namespace dsa {
namespace indexer_logits_sm90 {

CUtensorMap Maps::queries(int elements, int heads, int queries) const {
  const uint64_t bytes = p.dtype == IndexerDtype::E4M3 ? 1 : 2;
  return cuda::make_tensor_map(p.q, {bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
                                     {uint64_t(p.dim), uint64_t(p.heads), uint64_t(p.queries)},
                                     {p.dim * bytes, p.q_stride * bytes},
                                     {uint32_t(elements), uint32_t(heads), uint32_t(queries)}});
}

CUtensorMap Maps::keys(int elements, int keys) const {
  const uint64_t bytes = p.dtype == IndexerDtype::E4M3 ? 1 : 2;
  return cuda::make_tensor_map(p.k, {bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                                     {uint64_t(p.dim), uint64_t(p.keys), 1},
                                     {p.k_stride * bytes, 0},
                                     {uint32_t(elements), uint32_t(keys), 1}});
}

// One block a row: -inf in [0, begin) and [end, S).
__global__ void fill_outside(const Arguments a) {
  for (int64_t t = blockIdx.x; t < a.queries; t += gridDim.x) {
    const Range r = whole_range(a, t);
    float* row = a.logits + t * a.logits_stride;
    for (int64_t s = threadIdx.x; s < r.begin; s += blockDim.x) __stcs(row + s, -INFINITY);
    for (int64_t s = r.end + threadIdx.x; s < a.keys; s += blockDim.x) __stcs(row + s, -INFINITY);
  }
}

}  // namespace indexer_logits_sm90

bool sm90_supports(const IndexerLogitsParams& p, const char** why_not) {
  const auto no = [&](const char* why) { return *why_not = why, false; };
  const int64_t bytes = p.dtype == IndexerDtype::E4M3 ? 1 : 2;
  if (!cuda::is_hopper()) return no("the current device is not of compute capability 9.0");
  if (p.heads < 1 || p.heads > 64) return no("the number of heads is not in 1 to 64");
  if (p.dim < 1 || p.dim > 128 || p.dim * bytes % 16) return no("the head size is over 128 or not a multiple of 16 bytes");
  if (p.queries < 0 || p.keys < 0 || p.keys > int64_t{1} << 30 || p.queries > int64_t{1} << 30)
    return no("more than 2^30 queries or keys");
  if (p.q_stride * bytes % 16 || p.k_stride * bytes % 16) return no("a stride of q or k is not a multiple of 16 bytes");
  if (reinterpret_cast<uintptr_t>(p.q) % 16 || reinterpret_cast<uintptr_t>(p.k) % 16) return no("q or k is not 16-byte aligned");
  return true;
}

void launch_indexer_logits_sm90(const IndexerLogitsParams& p) {
  using namespace indexer_logits_sm90;
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot run indexer_logits for Hopper (") + why + ") choose another implementation");
  if (p.queries == 0 || p.keys == 0) return;
  const bool e4m3 = p.dtype == IndexerDtype::E4M3;
  const Arguments a{p.queries, static_cast<int>(p.keys), p.heads, p.w, p.w_stride, p.k_scale, p.start, p.end,
                    p.logits, p.logits_stride, e4m3 ? kFewKeys : 1};
  if (p.fill_outside) {
    fill_outside<<<static_cast<int>(p.queries < 16384 ? p.queries : 16384), 256, 0, p.stream>>>(a);
    cuda::check(cudaGetLastError(), "launch the fill of indexer_logits");
  }
  (e4m3 ? launch_e4m3 : launch_bf16)(Maps{p}, a, p.stream);
  if (e4m3 && (p.start || p.end || p.keys < kFewKeys)) launch_short_e4m3(p, a);
}

}  // namespace dsa
