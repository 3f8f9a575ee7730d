// CTAs, or clusters of them, that run together and go through steps of their work at one pace, so that what they read or add
// to at a time stays in the L2 cache. Nobody relies on it: one that has waited for kPatience (others may not be running yet)
// goes its own way from there on.
#pragma once

#include <cstdint>

namespace dsa::cuda {

struct Pace {
  static constexpr int kCounters = 8;
  static constexpr int64_t kPatience = 200000;  // cycles

  int* counters;  // [kCounters] in global memory, zero before the launch
  int step = 0;
  bool kept = true;

  /// Waits until all `members` have begun the step before. By one thread of each.
  __device__ __forceinline__ void begin_step(int members) {
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(counters + step % kCounters) : "memory");
    if (step > 0 && kept) {
      const int* before = counters + (step - 1) % kCounters;
      const int wanted = ((step - 1) / kCounters + 1) * members;
      const int64_t from = clock64();
      for (int seen = 0; kept;) {
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(before) : "memory");
        if (seen >= wanted) break;
        kept = clock64() - from < kPatience;
      }
    }
    ++step;
  }
};

}  // namespace dsa::cuda
