// Random inputs on the device: a hash of (seed, place) drives Box-Muller, so that any size is filled in no time.
#pragma once

#include <cstdint>

namespace dsa::test {

void fill_normal_f32(float* out, int64_t n, uint64_t seed, float mean = 0, float deviation = 1);
void fill_normal_bf16(void* out, int64_t n, uint64_t seed, float deviation = 1);
void fill_normal_e4m3(void* out, int64_t n, uint64_t seed, float deviation = 64);

}  // namespace dsa::test
