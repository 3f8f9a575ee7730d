// Dense attention's backward pass on Hopper: its checks, its maps, and which keys each stretch of rows sees.
#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

#include "kernels/cuda/tensor_map.h"
#include "kernels/dense_mla/sm90_backward.cuh"

namespace dsa {
namespace dense_mla_sm90 {
namespace {

int64_t padded_rows(int64_t queries) { return (queries + kOwn - 1) / kOwn * kOwn; }

// A block a stretch. Rows past the last are like it.
__global__ void __launch_bounds__(kTile) bound_rows(const Arguments a) {
  __shared__ Bounds b;
  if (threadIdx.x == 0) b = {INT_MAX, 0, 0, INT_MAX};
  __syncthreads();
  const int t = min(static_cast<int>(blockIdx.x * kTile + threadIdx.x), a.queries - 1), start = a.start[t], end = a.end[t];
  if (start < end) atomicMin(&b.first, start), atomicMax(&b.last, end);
  atomicMax(&b.all_first, start), atomicMin(&b.all_last, end);
  __syncthreads();
  if (threadIdx.x == 0) a.bounds[blockIdx.x] = b;
}

CUtensorMap map(const DenseMlaOperand& x, int columns, int heads, int64_t rows, uint32_t box) {
  return cuda::make_tensor_map(x.data, {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                        3,
                                        {static_cast<uint64_t>(columns), static_cast<uint64_t>(heads), static_cast<uint64_t>(rows)},
                                        {static_cast<uint64_t>(x.head_stride) * 2, static_cast<uint64_t>(x.stride) * 2},
                                        {64, 1, box}});
}

}  // namespace
}  // namespace dense_mla_sm90

size_t dense_mla_workspace_bytes(int64_t queries, int heads) {
  using namespace dense_mla_sm90;
  const int64_t rows = padded_rows(queries);
  return static_cast<size_t>(rows / kTile * static_cast<int64_t>(sizeof(Bounds)) + rows * heads * 8);
}

bool sm90_supports(const DenseMlaBackwardParams& p, const char** why_not) {
  const auto no = [&](const char* why) { return *why_not = why, false; };
  if (!cuda::is_hopper()) return no("the current device is not of compute capability 9.0");
  if (p.heads < 1 || p.heads > 65536) return no("the number of heads is not in 1 to 65536");
  if (p.queries < 0 || p.keys < 0 || p.keys > int64_t{1} << 30 || p.queries > int64_t{1} << 30)
    return no("more than 2^30 queries or keys");
  if (std::max(p.queries, p.keys) / dense_mla_sm90::kOwn >= (int64_t{1} << 31) / p.heads - 1) return no("more rows and heads than CTAs in a grid");
  for (const DenseMlaOperand* x : {&p.q, &p.k, &p.v, &p.o, &p.d_o}) {
    if (x->stride % 8 || x->head_stride % 8) return no("a stride is not a multiple of 8 elements");
    if (reinterpret_cast<uintptr_t>(x->data) % 16) return no("q, k, v, o or do is not 16-byte aligned");
  }
  return true;
}

void launch_dense_mla_backward_sm90(const DenseMlaBackwardParams& p) {
  using namespace dense_mla_sm90;
  const auto refuse = [](const std::string& why, const char* advice) {
    throw std::runtime_error("cannot differentiate dense attention on Hopper (" + why + ") " + advice);
  };
  const char* why = nullptr;
  if (!sm90_supports(p, &why)) refuse(why, "choose another implementation");
  if (p.workspace_bytes < dense_mla_workspace_bytes(p.queries, p.heads) || reinterpret_cast<uintptr_t>(p.workspace) % 16)
    refuse("the workspace of " + std::to_string(p.workspace_bytes) + " bytes is too small or not 16-byte aligned",
           "give dense_mla_workspace_bytes()");
  if (p.queries == 0 || p.keys == 0) {  // nothing sees anything
    const size_t row = static_cast<size_t>(p.heads) * 2, queries = static_cast<size_t>(p.queries), keys = static_cast<size_t>(p.keys);
    cuda::check(cudaMemsetAsync(p.dq, 0, queries * row * kDim, p.stream), "clear dense attention's query gradient");
    cuda::check(cudaMemsetAsync(p.dk, 0, keys * row * kDim, p.stream), "clear dense attention's key gradient");
    cuda::check(cudaMemsetAsync(p.dv, 0, keys * row * kValueDim, p.stream), "clear dense attention's value gradient");
    return;
  }
  Arguments a{};
  a.queries = static_cast<int>(p.queries), a.keys = static_cast<int>(p.keys), a.heads = p.heads;
  a.scale = p.scale, a.scale_log2 = p.scale * kLog2e;
  a.o = p.o, a.d_o = p.d_o, a.lse = p.lse, a.start = p.start, a.end = p.end;
  a.dq = static_cast<__nv_bfloat16*>(p.dq), a.dk = static_cast<__nv_bfloat16*>(p.dk), a.dv = static_cast<__nv_bfloat16*>(p.dv);
  a.padded = static_cast<int>(padded_rows(p.queries));
  a.bounds = static_cast<Bounds*>(p.workspace);
  a.bias = reinterpret_cast<float*>(a.bounds + a.padded / kTile), a.delta = a.bias + int64_t{a.padded} * a.heads;
  bound_rows<<<a.padded / kTile, kTile, 0, p.stream>>>(a);
  cuda::check(cudaGetLastError(), "launch the bounds of dense attention's rows");
  const auto maps = [&](uint32_t rows, uint32_t keys) {
    return Maps{map(p.q, kDim, p.heads, p.queries, rows), map(p.d_o, kValueDim, p.heads, p.queries, rows),
                map(p.k, kDim, p.heads, p.keys, keys), map(p.v, kValueDim, p.heads, p.keys, keys)};
  };
  launch_queries(maps(kOwn, kTile), a, p.stream);
  launch_keys(maps(kTile, kOwn), a, p.stream);
}

}  // namespace dsa
