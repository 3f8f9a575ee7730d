// Asynchronous copies without a tensor map (PTX ISA, cp.async and cp.async.bulk), named barriers, matrix loads and
// stores.
#pragma once

#include <cstdint>

#include "kernels/cuda/mbarrier.cuh"

namespace dsa::cuda {

/// 16 bytes to shared memory, or 16 zero bytes (then `from` is not read).
__device__ __forceinline__ void copy16_or_zero(uint32_t to, const void* from, bool read) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read ? 16 : 0)
               : "memory");
}

/// The same; from memory the L2 cache takes the aligned 256 bytes around them.
__device__ __forceinline__ void copy16_or_zero_and_256(uint32_t to, const void* from, bool read) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read ? 16 : 0)
               : "memory");
}

/// The same with a hint to the L2 cache.
__device__ __forceinline__ void copy16_or_zero(uint32_t to, const void* from, bool read, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(read ? 16 : 0), "l"(policy)
               : "memory");
}

/// Brings bytes into the L2 cache; 16-byte aligned, a multiple of 16.
template <int bytes>
__device__ __forceinline__ void prefetch_l2(const void* from) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "n"(bytes) : "memory");
}

/// Arrives once this thread's earlier cp.async have landed. Counts as one of the barrier's arrivals.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// Contiguous bytes, 16-byte aligned, multiples of 16.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
/// Waits until the shared memory of this thread's bulk stores (cp.async.bulk to global memory), but for the last
/// `pending`, may be overwritten.
template <int pending = 0>
__device__ __forceinline__ void bulk_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
/// Waits until this thread's bulk stores are complete.
__device__ __forceinline__ void bulk_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/// Orders ordinary accesses to shared memory before those of the tensor cores and the copy engine.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int id, int threads>
__device__ __forceinline__ void barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(threads) : "memory");
}
template <int id, int threads>
__device__ __forceinline__ void barrier_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(id), "n"(threads) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements, rows at the addresses given by lanes 0-7, 8-15, 16-23, 24-31.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t d0, uint32_t d1, uint32_t d2, uint32_t d3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(d0), "r"(d1),
               "r"(d2), "r"(d3)
               : "memory");
}

}  // namespace dsa::cuda
