// Warpgroup matrix instructions for bf16 with fp32 accumulators (PTX ISA, wgmma), K = 16: d[64 x N] (+)= A[64 x 16] B[16 x N].
// A from shared memory or registers, either operand in either order; shared operands are 128-byte swizzled. Accumulators
// lie as in wgmma.cuh. Operands whose rows run along K are described by operand_along_k; operands stored with rows along M
// or N (the `across` flags) by operand_across_k.
//
// A in registers, lane l of warp w: {row 16w + l/4, columns 2(l%4) and +1}, {row + 8}, {columns + 8}, {both}.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/wgmma.cuh"

namespace dsa::cuda {

/// Operand whose rows of 64 elements (128 bytes, swizzled) run along K, eight rows in 1024 bytes. Advance K by 16: add 2.
__device__ __forceinline__ uint64_t operand_along_k(const void* p) {
  return 0x4000004000000000ull | (shared_address(p) & 0x3FFFF) >> 4 | 1u << 16;
}

/// Operand whose rows of 64 elements (128 bytes, swizzled) run along M or N, eight values of K in 1024 bytes; the next 64
/// elements lie panel_bytes further. Advance K by 16: add 128.
__device__ __forceinline__ uint64_t operand_across_k(const void* p, uint32_t panel_bytes = 1024) {
  return 0x4000004000000000ull | (shared_address(p) & 0x3FFFF) >> 4 | panel_bytes >> 4 << 16;
}

/// Two neighbours of a row of A in one register, rounded to bf16.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(two);
}

/// N = 32, A in registers.
template <bool b_across>
__device__ __forceinline__ void wgmma_bf16_n32(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate = 1) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      DSA_REGISTERS_16
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, %22;\n}"
      : DSA_ACCUMULATORS_16("+f")
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(b_across));
}

/// N = 64, A and B in shared memory; accumulate = 0 overwrites d. a_sign: 1, or -1 to subtract the product.
template <bool a_across, bool b_across, int a_sign = 1>
__device__ __forceinline__ void wgmma_bf16_n64(float (&d)[32], uint64_t a, uint64_t b, int accumulate = 1) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      DSA_REGISTERS_32
      "}, %32, %33, p, %37, 1, %35, %36;\n}"
      : DSA_ACCUMULATORS_32("+f")
      : "l"(a), "l"(b), "r"(accumulate), "n"(a_across), "n"(b_across), "n"(a_sign));
}

/// N = 64, A in registers.
template <bool b_across>
__device__ __forceinline__ void wgmma_bf16_n64(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate = 1) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      DSA_REGISTERS_32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
      : DSA_ACCUMULATORS_32("+f")
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(b_across));
}

/// N = 128, A and B in shared memory; accumulate = 0 overwrites d. a_sign: 1, or -1 to subtract the product.
template <bool a_across, bool b_across, int a_sign = 1>
__device__ __forceinline__ void wgmma_bf16_n128(float (&d)[64], uint64_t a, uint64_t b, int accumulate = 1) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      DSA_REGISTERS_64
      "}, %64, %65, p, %69, 1, %67, %68;\n}"
      : DSA_ACCUMULATORS_64("+f")
      : "l"(a), "l"(b), "r"(accumulate), "n"(a_across), "n"(b_across), "n"(a_sign));
}

/// N = 128, A in registers.
template <bool b_across, int a_sign = 1>
__device__ __forceinline__ void wgmma_bf16_n128(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate = 1) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      DSA_REGISTERS_64
      "}, {%64, %65, %66, %67}, %68, p, %71, 1, %70;\n}"
      : DSA_ACCUMULATORS_64("+f")
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(b_across), "n"(a_sign));
}

/// N = 192, A in registers.
template <bool b_across>
__device__ __forceinline__ void wgmma_bf16_n192(float (&d)[96], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      DSA_REGISTERS_96
      "}, {%96, %97, %98, %99}, %100, 1, 1, 1, %101;"
      : DSA_ACCUMULATORS_96("+f")
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(b_across));
}

}  // namespace dsa::cuda
