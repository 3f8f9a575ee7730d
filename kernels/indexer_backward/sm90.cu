// What the Hopper kernels of indexer_backward accept, and their tensor maps.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/check.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/indexer_backward/sm90_kernel.cuh"

namespace dsa {
namespace {

constexpr auto kBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

size_t bits_bytes(int64_t keys, int64_t rows) {
  using namespace indexer_backward_sm90;
  return static_cast<size_t>((rows + 1) / 2 * ((keys + 2 * kTile - 1) / (2 * kTile) * 2) * kPairWords * 4);
}

// Query rows at a time: pairs for every multiprocessor, as often as half a GiB of bits allows, at least twice.
int64_t block_rows(const IndexerBackwardParams& p) {
  const int64_t wave = 2 * cuda::multiprocessors(), waves = static_cast<int64_t>((size_t{1} << 29) / (bits_bytes(p.keys, wave) + 1));
  return std::min(std::max<int64_t>(waves, 2) * wave, p.queries + p.queries % 2);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

bool sm90_supports(const IndexerBackwardParams& p, const char** why_not) {
  const auto no = [&](const char* why) { return *why_not = why, false; };
  constexpr int64_t kMost = int64_t{1} << 30;
  if (!cuda::is_hopper()) return no("the current device is not of compute capability 9.0");
  if (p.heads < 1 || p.heads > indexer_backward_sm90::kHeads) return no("the number of heads is not in 1 to 64");
  if (p.dim != indexer_backward_sm90::kDim) return no("the head size is not 128");
  if (p.queries < 0 || p.keys < 0 || p.keys > kMost || p.queries > kMost) return no("more than 2^30 queries or keys");
  if (p.q_stride % 8 || p.k_stride % 8) return no("a stride of q or k is not a multiple of 8");
  if (p.d_logits_stride % 4) return no("the stride of d_logits is not a multiple of 4");
  if (!aligned(p.q) || !aligned(p.k) || !aligned(p.d_logits) || !aligned(p.dq) || !aligned(p.dk) || !aligned(p.workspace))
    return no("q, k, d_logits, dq, dk or the workspace is not 16-byte aligned");
  return true;
}

size_t indexer_backward_workspace_bytes(const IndexerBackwardParams& p) {
  return bits_bytes(p.keys, block_rows(p)) + indexer_backward_sm90::keys_workspace_bytes(p.keys, cuda::multiprocessors());
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
  const int64_t block = block_rows(p);
  void* const key_work = static_cast<char*>(p.workspace) + bits_bytes(p.keys, block);
  const auto* const q = static_cast<const uint16_t*>(p.q);
  for (int64_t t = 0; t < p.queries; t += block) {
    const int64_t rows = std::min(block, p.queries - t);
    const Maps maps{
        cuda::make_tensor_map(q + t * p.q_stride, {kBf16, 3, {kDim, size(p.heads), size(rows)}, {kDim * 2, size(p.q_stride) * 2}, {64, kHeads, 2}}),
        cuda::make_tensor_map(p.k, {kBf16, 2, {kDim, size(p.keys), 1}, {size(p.k_stride) * 2, 0}, {64, kTile, 1}}),
        cuda::make_tensor_map(p.d_logits + t * p.d_logits_stride,
                              {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, {size(p.keys), size(rows), 1},
                               {size(p.d_logits_stride) * 4, 0}, {32, 2, 1}})};
    const Arguments a{static_cast<int>(rows), static_cast<int>(p.keys), p.heads, p.w + t * p.w_stride, p.w_stride,
                      p.start ? p.start + t : nullptr, p.end ? p.end + t : nullptr,
                      static_cast<char*>(p.dq) + t * p.heads * kDim * (p.dq_bf16 ? 2 : 4), p.dq_bf16, p.dw + t * p.heads, p.dk,
                      static_cast<uint32_t*>(p.workspace)};
    launch_queries(maps, a, p.stream);
    launch_keys(maps, a, key_work, p.stream);
  }
}

}  // namespace dsa
