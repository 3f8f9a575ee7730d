// Thread block clusters (PTX ISA, barrier.cluster, mapa, multicast copies): blocks that share what one of them copies.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/mbarrier.cuh"

namespace dsa::cuda {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// All threads of all blocks of the cluster; what was written before is seen by all after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Arrives at the barrier that lies at this address in the shared memory of another block of the cluster, or of this one.
/// It orders nothing at the cluster's scope (that would be a membar.gpu): for buffers that tensor cores have read.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier_address, uint32_t rank) {
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier_address), "r"(rank)
      : "memory");
}

/// A box to the same address of every block in the mask; each block's barrier at that address counts the bytes.
__device__ __forceinline__ void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
      "h"(blocks)
      : "memory");
}

__device__ __forceinline__ void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
      "r"(c2), "h"(blocks)
      : "memory");
}

}  // namespace dsa::cuda
