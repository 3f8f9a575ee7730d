// What the Hopper kernels of indexer_backward accept, and their tensor maps.
#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/indexer_backward/sm90_kernel.cuh"

namespace dsa {
namespace {

constexpr auto kBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

bool sm90_supports(const IndexerBackwardParams& p, const char** why_not) {
  const auto no = [&](const char* why) { return *why_not = why, false; };
  constexpr int64_t kMost = int64_t{1} << 30;
  if (!cuda::is_hopper()) return no("the current device is not of compute capability 9.0");
  if (p.heads < 1 || p.heads > indexer_backward_sm90::kHeads) return no("the number of heads is not in 1 to 64");
  if (p.dim != indexer_backward_sm90::kDim) return no("the head size is not 128");
  if (p.queries < 0 || p.keys < 0 || p.keys > kMost || p.queries > kMost) return no("more than 2^30 queries or keys");
  if (p.q_stride % 8 || p.k_stride % 8 || p.d_logits_stride % 8) return no("a stride of q, k or d_logits is not a multiple of 8");
  if (!aligned(p.q) || !aligned(p.k) || !aligned(p.d_logits) || !aligned(p.dq) || !aligned(p.dk) || !aligned(p.workspace))
    return no("q, k, d_logits, dq, dk or the workspace is not 16-byte aligned");
  return true;
}

size_t indexer_backward_workspace_bytes(const IndexerBackwardParams& p) {
  return indexer_backward_sm90::keys_workspace_bytes(p.keys, cuda::multiprocessors());
}

void launch_indexer_backward_sm90(const IndexerBackwardParams& p) {
  using namespace indexer_backward_sm90;
  const char* why = nullptr;
  if (!sm90_supports(p, &why))
    throw std::runtime_error(std::string("cannot run indexer_backward for Hopper (") + why + ") choose another implementation");
  if (p.workspace_bytes < indexer_backward_workspace_bytes(p))
    throw std::runtime_error("cannot run indexer_backward (the workspace of " + std::to_string(p.workspace_bytes) +
                             " bytes is too small) give indexer_backward_workspace_bytes(p)");
  if (p.queries == 0) return;
  if (p.keys == 0) {
    const size_t rows = p.queries * p.heads;
    cuda::check(cudaMemsetAsync(p.dq, 0, rows * kDim * (p.dq_bf16 ? 2 : 4), p.stream), "clear dq");
    cuda::check(cudaMemsetAsync(p.dw, 0, rows * sizeof(float), p.stream), "clear dw");
    return;
  }
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  const Maps maps{
      cuda::make_tensor_map(p.q, {kBf16, 3, {kDim, size(p.heads), size(p.queries)}, {kDim * 2, size(p.q_stride) * 2}, {64, kHeads, 2}}),
      cuda::make_tensor_map(p.k, {kBf16, 2, {kDim, size(p.keys), 1}, {size(p.k_stride) * 2, 0}, {64, kTile, 1}}),
      cuda::make_tensor_map(p.d_logits, {kBf16, 2, {size(p.keys), size(p.queries), 1}, {size(p.d_logits_stride) * 2, 0}, {64, 2, 1}})};
  const Arguments a{static_cast<int>(p.queries), static_cast<int>(p.keys), p.heads, p.w, p.w_stride, p.start, p.end,
                    p.dq, p.dq_bf16, p.dw, p.dk};
  launch_queries(maps, a, p.stream);
  launch_keys(maps, a, p.workspace, p.stream);
}

}  // namespace dsa
