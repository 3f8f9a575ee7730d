// Scores as unsigned numbers of the same order.
#pragma once

#include <cstdint>

namespace dsa::topk_select_sm90 {

/// +0 and -0 share a key; no score has the key 0, nor the one just below zero's, which -0 would have.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t b = __float_as_uint(x + 0.f);
  return b & 0x80000000u ? ~b : b | 0x80000000u;
}

/// The greatest score of a key not above this one.
__device__ __forceinline__ float score_of(uint32_t key) {
  if (key == 0x7FFFFFFFu) --key;
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

}  // namespace dsa::topk_select_sm90
