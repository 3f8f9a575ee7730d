// The Hopper rotation and quantisation against the same formula in plain loops on the host: bit-equal.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>

#include "kernels/hadamard_quantise/params.h"
#include "tests/support/cuda_device.h"
#include "tests/support/cuda_random.h"

namespace dsa::test {
namespace {

float value_of(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

struct Quantised {
  uint8_t codes[128];
  float scale;
};

Quantised reference(const float (&x)[128], bool hadamard, bool power_of_two) {
  float y[128];
  std::memcpy(y, x, sizeof y);
  if (hadamard) {
    for (int h = 1; h < 128; h *= 2)
      for (int i = 0; i < 128; ++i)
        if (!(i & h)) {
          const float a = y[i], b = y[i + h];
          y[i] = a + b, y[i + h] = a - b;
        }
    for (float& v : y) v = __bfloat162float(__float2bfloat16_rn(v * 0.08838834764831845f));
  }
  float amax = 1e-4f;
  for (const float v : y) amax = std::max(amax, std::fabs(v));
  Quantised out;
  out.scale = amax / 448;
  if (power_of_two) out.scale = std::exp2(std::ceil(std::log2(static_cast<double>(out.scale))));
  for (int i = 0; i < 128; ++i) out.codes[i] = __nv_cvt_float_to_fp8(y[i] / out.scale, __NV_SATFINITE, __NV_E4M3);
  return out;
}

TEST(HadamardQuantise, BitEqual) {
  if (!have_device()) {
    std::puts("no CUDA device");
    GTEST_SKIP();
  }
  for (const int64_t rows : {1, 3, 5001}) {
    const int64_t stride = 136;
    const DeviceArray<uint16_t> x(rows * stride);
    fill_normal_bf16(x.data(), x.size(), 3);
    std::vector<uint16_t> host = x.host();
    for (int64_t r = 0; r < rows; ++r)  // scales from below the clamp to near the largest bf16
      for (int i = 0; i < 128; ++i) {
        float v = value_of(host[r * stride + i]);
        v = std::ldexp(v, static_cast<int>(r % 150) - 40);
        if (r % 11 == 5) v = i == 17 ? 1.f : 0.f;
        if (r % 11 == 6) v = 0.f;
        host[r * stride + i] = static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(v)).x;
      }
    const DeviceArray<uint16_t> in(host);
    const DeviceArray<uint8_t> codes(rows * 128);
    const DeviceArray<float> scale(rows);
    for (const bool hadamard : {true, false})
      for (const bool power_of_two : {true, false}) {
        codes.fill_bytes(0x7F);
        HadamardQuantiseParams p;
        p.rows = rows, p.x = in.data(), p.x_stride = stride, p.codes = codes.data(), p.scale = scale.data();
        p.hadamard = hadamard, p.power_of_two = power_of_two;
        launch_hadamard_quantise_sm90(p);
        const std::vector<uint8_t> got = codes.host();
        const std::vector<float> got_scale = scale.host();
        for (int64_t r = 0; r < rows; ++r) {
          float row[128];
          for (int i = 0; i < 128; ++i) row[i] = value_of(host[r * stride + i]);
          const Quantised want = reference(row, hadamard, power_of_two);
          ASSERT_EQ(got_scale[r], want.scale) << "row " << r;
          ASSERT_EQ(0, std::memcmp(&got[r * 128], want.codes, 128)) << "row " << r << " hadamard " << hadamard << " power of two " << power_of_two;
        }
      }
  }
}

}  // namespace
}  // namespace dsa::test
