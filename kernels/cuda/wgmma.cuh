// Warpgroup matrix instructions (PTX ISA, wgmma): d[64 x 128] (+)= A[64 x K] B[128 x K]^T, operands in shared memory as
// rows of 128 bytes, 128-byte swizzled, accumulators in registers.
//
// Accumulator d[4b + 2h + e] of a thread with lane l in warp w of the warpgroup: row 16w + l/4 + 8h, column
// 8b + 2(l%4) + e.
#pragma once

#include <cstdint>

#include "kernels/cuda/mbarrier.cuh"

namespace dsa::cuda {

/// Registers a thread of this warpgroup may use from here on (setmaxnreg).
template <int count>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

/// Operand of 128-byte rows, groups of eight rows 1024 bytes apart, swizzled. The low word of its descriptor; advance by
/// 16 bytes: add 1.
__device__ __forceinline__ uint32_t wgmma_operand(const void* p) { return (shared_address(p) & 0x3FFFF) >> 4 | 1u << 16; }

/// The whole descriptor.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t operand) { return 0x4000004000000000ull | operand; }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until at most `pending` committed groups are unfinished.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/// Keeps the compiler from reading accumulators before the wait above it.
template <int n>
__device__ __forceinline__ void wgmma_settle(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The instructions' operands, in the order of the registers: as text, and as accumulators with the constraint c.
#define DSA_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DSA_REGISTERS_32 \
  DSA_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSA_REGISTERS_64 \
  DSA_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DSA_REGISTERS_96 \
  DSA_REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define DSA_ACCUMULATORS_4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define DSA_ACCUMULATORS_16_FROM(c, i) \
  DSA_ACCUMULATORS_4(c, i), DSA_ACCUMULATORS_4(c, i + 4), DSA_ACCUMULATORS_4(c, i + 8), DSA_ACCUMULATORS_4(c, i + 12)
#define DSA_ACCUMULATORS_16(c) DSA_ACCUMULATORS_16_FROM(c, 0)
#define DSA_ACCUMULATORS_32(c) DSA_ACCUMULATORS_16(c), DSA_ACCUMULATORS_16_FROM(c, 16)
#define DSA_ACCUMULATORS_64(c) DSA_ACCUMULATORS_32(c), DSA_ACCUMULATORS_16_FROM(c, 32), DSA_ACCUMULATORS_16_FROM(c, 48)
#define DSA_ACCUMULATORS_96(c) DSA_ACCUMULATORS_64(c), DSA_ACCUMULATORS_16_FROM(c, 64), DSA_ACCUMULATORS_16_FROM(c, 80)

// Two forms of each: the first overwrites d (so that d needs no register before), the second adds to it.
/// K = 32. d = A B^T.
__device__ __forceinline__ void wgmma_e4m3_first(float (&d)[64], uint32_t a, uint32_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      DSA_REGISTERS_64
      "}, %64, %65, 0, 1, 1;"
      : DSA_ACCUMULATORS_64("=f")
      : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)));
}

/// K = 32. d += A B^T.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], uint32_t a, uint32_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      DSA_REGISTERS_64
      "}, %64, %65, 1, 1, 1;"
      : DSA_ACCUMULATORS_64("+f")
      : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)));
}

/// K = 16. d = A B^T.
__device__ __forceinline__ void wgmma_bf16_first(float (&d)[64], uint32_t a, uint32_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      DSA_REGISTERS_64
      "}, %64, %65, 0, 1, 1, 0, 0;"
      : DSA_ACCUMULATORS_64("=f")
      : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)));
}

/// K = 16. d += A B^T.
__device__ __forceinline__ void wgmma_bf16(float (&d)[64], uint32_t a, uint32_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      DSA_REGISTERS_64
      "}, %64, %65, 1, 1, 1, 0, 0;"
      : DSA_ACCUMULATORS_64("+f")
      : "l"(wgmma_descriptor(a)), "l"(wgmma_descriptor(b)));
}

}  // namespace dsa::cuda
