// What a device kernel needs to know to apply SwiGLU's elementwise half; no LibTorch, no CUDA header.
//
//   a = silu(g) u                  silu(g) = g sig(g), sig = 1 / (1 + exp(-g))
//   du = da silu(g)                dg = da u (sig + silu(g) (1 - sig))
//
// All bf16, computed in fp32, rounded once.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace dsa {

struct SwigluParams {
  int64_t elements = 0;        ///< a multiple of 8; pointers 16-byte aligned, contiguous
  const void* g = nullptr;
  const void* u = nullptr;
  void* a = nullptr;           ///< written unless null

  const void* da = nullptr;    ///< null: forward only
  void* dg = nullptr;          ///< may be g's own memory
  void* du = nullptr;          ///< may be u's own memory

  CUstream_st* stream = nullptr;
};

/// Enqueues the kernel. Throws std::runtime_error when CUDA reports an error.
void launch_swiglu(const SwigluParams& p);

}  // namespace dsa
