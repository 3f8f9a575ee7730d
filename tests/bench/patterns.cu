#include "tests/bench/patterns.h"

#include <cuda_bf16.h>

#include "kernels/cuda/check.h"
#include "tests/support/cuda_random.h"

namespace dsa::bench {
namespace {

__global__ void transform(float* x, int64_t n, int kind) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{blockDim.x} * gridDim.x) {
    const float v = x[i];
    switch (kind) {
      case 1: x[i] = 1.5f; break;
      case 2: x[i] = v > 0 ? 2.f : 1.f; break;
      case 3: x[i] = rintf(v * 4); break;
      case 4: x[i] = __bfloat162float(__float2bfloat16_rn(v)); break;
      case 5: x[i] = 1.f + 1e-4f * fabsf(v); break;
      case 6: x[i] = -100.f + 1e-5f * rintf(v * 8); break;
      default: break;
    }
  }
}

}  // namespace

const std::vector<Pattern>& patterns() {
  static const std::vector<Pattern> all = {{"random", 0},           {"all equal", 1},      {"two values", 2},
                                           {"twenty values", 3},    {"rounded to bf16", 4}, {"band of 1e-4", 5},
                                           {"band of few steps", 6}};
  return all;
}

void fill(const Pattern& pattern, float* out, int64_t rows, int64_t columns, uint64_t seed) {
  test::fill_normal_f32(out, rows * columns, seed);
  transform<<<1056, 256>>>(out, rows * columns, pattern.kind);
  cuda::check(cudaGetLastError(), "launch the pattern fill");
}

}  // namespace dsa::bench
