// Chooses the padded head count and launches; included once per dtype.
#pragma once

#include "kernels/cuda/check.h"
#include "kernels/indexer_logits/sm90_kernel.cuh"

namespace dsa::indexer_logits_sm90 {

template <class C>
void launch_config(const Maps& maps, const Arguments& a, cudaStream_t stream) {
  const CUtensorMap map_q = maps.queries(C::kPanelElements, C::kHeads, C::kStepQueries);
  const CUtensorMap map_k = maps.keys(C::kPanelElements, C::kTileKeys);
  constexpr int kBytes = sizeof(Shared<C>);
  static_assert(kBytes <= 227 * 1024, "more than a Hopper block may have");
  cuda::check(cudaFuncSetAttribute(score<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
              "reserve shared memory for indexer_logits");
  score<C><<<cuda::multiprocessors(), C::kThreads, kBytes, stream>>>(map_q, map_k, a);
  cuda::check(cudaGetLastError(), "launch indexer_logits");
}

template <bool kFp8>
void launch_heads(const Maps& maps, const Arguments& a, cudaStream_t stream) {
  if (a.heads <= 8) return launch_config<Config<kFp8, 8>>(maps, a, stream);
  if (a.heads <= 16) return launch_config<Config<kFp8, 16>>(maps, a, stream);
  if (a.heads <= 32) return launch_config<Config<kFp8, 32>>(maps, a, stream);
  launch_config<Config<kFp8, 64>>(maps, a, stream);
}

}  // namespace dsa::indexer_logits_sm90
