// Instructions that only the backward kernels use, beside kernels/cuda/ (PTX ISA): reductions, copies of what is used
// once, matrix loads, and wgmma with accumulators that products of different widths share: the narrower one takes the
// first of them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/wgmma_bf16.cuh"

namespace dsa::cuda {

/// Adds 64-bit words of shared memory to global memory; 16-byte aligned, a multiple of 16 bytes. The shared memory is
/// read until bulk_store_wait_read; commit first.
__device__ __forceinline__ void bulk_add_u64(uint64_t* to, const void* from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u64 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// One lane of a warp, always the same one.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xFFFFFFFF;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}

/// A cache policy for what is read or written once: it leaves the L2 cache before anything else.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void tma_load_3d_once(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1,
                                                 int c2, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
      "%4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void bulk_load_once(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                                               uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void bulk_store_once(void* to, const void* from, uint32_t bytes, uint64_t policy) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes), "l"(policy)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Four 8 x 8 matrices of 16-bit elements, each transposed; rows at the addresses given by lanes 0-7, 8-15, 16-23,
/// 24-31.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

/// N = 16; accumulate = 0 overwrites d.
template <bool a_across, bool b_across>
__device__ __forceinline__ void wgmma_bf16_n16(float (&d)[8], uint64_t a, uint64_t b, int accumulate = 1) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, %11, "
      "%12;\n}"
      : DSA_ACCUMULATORS_4("+f", 0), DSA_ACCUMULATORS_4("+f", 4)
      : "l"(a), "l"(b), "r"(accumulate), "n"(a_across), "n"(b_across));
}

/// N = 32: the first 32 of 64 columns.
template <bool a_across, bool b_across>
__device__ __forceinline__ void wgmma_bf16_n32_of_64(float (&d)[32], uint64_t a, uint64_t b, int accumulate = 1) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      DSA_REGISTERS_16
      "}, %16, %17, p, 1, 1, %19, %20;\n}"
      : DSA_ACCUMULATORS_16("+f")
      : "l"(a), "l"(b), "r"(accumulate), "n"(a_across), "n"(b_across));
}

}  // namespace dsa::cuda
