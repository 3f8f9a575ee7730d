// Shared-memory barriers that count arrivals and bytes (PTX ISA, mbarrier), and the proxy fence beside them.
#pragma once

#include <cstdint>

namespace dsa::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// Keeps the compiler from computing a value again and again where a register serves.
__device__ __forceinline__ uint32_t keep(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int64_t keep(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

/// One phase completes after `arrivals` arrivals and the bytes announced by them.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

/// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier_address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier_address) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive(shared_address(barrier)); }

/// Arrives and announces bytes that a bulk copy will deliver.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

/// Waits until the phase of this parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier_address, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done) : "r"(barrier_address), "r"(parity) : "memory");
  } while (!done);
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) { mbarrier_wait(shared_address(barrier), parity); }

/// The buffer of a ring of n that comes next, and the parity to wait for: 0 to begin with for who reads it, the inverse for who
/// fills it.
template <int n>
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++index == n) index = 0, parity ^= 1;
  }
};

}  // namespace dsa::cuda
