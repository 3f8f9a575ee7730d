#include "data/fp8_block.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "data/float_formats.h"
#include "data/safetensors.h"
#include "tests/data/temp_folder.h"

namespace dsa {
namespace {

using namespace testing_support;

template <class T>
std::vector<T> tensor(const SafetensorsFile& file, const std::string& name) {
  const TensorEntry* entry = file.find(name);
  EXPECT_NE(entry, nullptr) << name;
  std::vector<T> values(entry->bytes() / sizeof(T));
  file.read(*entry, 0, entry->bytes(), values.data());
  return values;
}

TEST(Fp8, DecodesAndEncodesAsTorchDoes) {
  const SafetensorsFile file(golden("fp8_vectors.safetensors"));
  const auto decode = tensor<float>(file, "decode");
  ASSERT_EQ(decode.size(), 256u);
  for (int code = 0; code < 256; ++code) {
    const float mine = e4m3_to_float(static_cast<uint8_t>(code)), theirs = decode[static_cast<size_t>(code)];
    if (std::isnan(theirs)) EXPECT_TRUE(std::isnan(mine)) << code;
    else EXPECT_EQ(float_to_bits(mine), float_to_bits(theirs)) << code;
  }
  const auto x = tensor<float>(file, "encode.x");
  const auto code = tensor<uint8_t>(file, "encode.code");
  ASSERT_EQ(x.size(), 1030u);
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(float_to_e4m3(x[i]), code[i]) << x[i];
  EXPECT_TRUE(std::isnan(e4m3_to_float(float_to_e4m3(std::nanf("")))));
}

TEST(Fp8, PowerOfTwoScalesAreExact) {
  const SafetensorsFile file(golden("fp8_vectors.safetensors"));
  const auto amax = tensor<float>(file, "ue8m0.amax"), scale = tensor<float>(file, "ue8m0.scale");
  ASSERT_EQ(amax.size(), 596u);
  for (size_t i = 0; i < amax.size(); ++i) EXPECT_EQ(ue8m0_scale(amax[i]), scale[i]) << amax[i];
}

TEST(FloatFormats, Bfloat16RoundsToNearestEven) {
  for (uint32_t b = 0; b < 65536; ++b) {
    const float f = bf16_to_float(static_cast<uint16_t>(b));
    if (std::isnan(f)) EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(f))));
    else EXPECT_EQ(float_to_bf16(f), b);
  }
  EXPECT_EQ(float_to_bf16(bits_to_float(0x3f808000u)), 0x3f80);  // a tie goes to even
  EXPECT_EQ(float_to_bf16(bits_to_float(0x3f818000u)), 0x3f82);
  EXPECT_EQ(float_to_bf16(bits_to_float(0x3f808001u)), 0x3f81);
  EXPECT_EQ(float_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
}

TEST(FloatFormats, Float16) {
  EXPECT_EQ(f16_to_float(0x3c00), 1.0f);
  EXPECT_EQ(f16_to_float(0xc000), -2.0f);
  EXPECT_EQ(f16_to_float(0x7bff), 65504.0f);
  EXPECT_EQ(f16_to_float(0x0001), std::ldexp(1.0f, -24));
  EXPECT_EQ(f16_to_float(0x03ff), std::ldexp(1023.0f, -24));
  EXPECT_TRUE(std::isinf(f16_to_float(0x7c00)) && std::isnan(f16_to_float(0x7e00)));
}

std::vector<float> random_weights(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> w(static_cast<size_t>(n));
  for (float& v : w) v = normal(random);
  return w;
}

// The formula of the header as plain loops, in double, on shapes with partial blocks.
TEST(Fp8, QuantisesAsTheFormula) {
  const int64_t rows = 200, cols = 300;
  auto w = random_weights(rows * cols, 1);
  for (int64_t c = 0; c < 10; ++c) w[static_cast<size_t>(130 * cols + 260 + c)] = 37.0f * static_cast<float>(c);
  std::vector<uint8_t> codes(w.size());
  std::vector<float> scales(2 * 3), back(w.size());
  fp8_quantize(w.data(), rows, cols, codes.data(), scales.data());
  fp8_dequantize(codes.data(), rows, cols, 0, 0, scales.data(), 3, back.data());
  for (int64_t br = 0; br < 2; ++br)
    for (int64_t bc = 0; bc < 3; ++bc) {
      double amax = 1e-4;
      for (int64_t r = br * 128; r < std::min(rows, br * 128 + 128); ++r)
        for (int64_t c = bc * 128; c < std::min(cols, bc * 128 + 128); ++c)
          amax = std::max(amax, std::fabs(static_cast<double>(w[static_cast<size_t>(r * cols + c)])));
      const double scale = std::exp2(std::ceil(std::log2(amax / 448)));
      EXPECT_EQ(scales[static_cast<size_t>(br * 3 + bc)], scale);
      for (int64_t r = br * 128; r < std::min(rows, br * 128 + 128); ++r)
        for (int64_t c = bc * 128; c < std::min(cols, bc * 128 + 128); ++c) {
          const size_t i = static_cast<size_t>(r * cols + c);
          const double x = std::fabs(w[i] / scale), value = std::fabs(back[i] / scale);
          // Half a step: 3 bits of mantissa, and 2^-9 below 2^-6.
          const double step = x < std::exp2(-6) ? std::exp2(-9) : std::exp2(std::floor(std::log2(x)) - 3);
          EXPECT_LE(std::fabs(x - value), step / 2) << r << "," << c;
          EXPECT_EQ(back[i], e4m3_to_float(codes[i]) * scales[static_cast<size_t>(br * 3 + bc)]);
        }
    }
}

TEST(Fp8, RequantisingPowerOfTwoScalesKeepsTheValues) {
  const int64_t rows = 300, cols = 144;
  const auto w = random_weights(rows * cols, 2);
  std::vector<uint8_t> codes(w.size());
  std::vector<float> scales(3 * 2), once(w.size()), twice(w.size());
  fp8_quantize(w.data(), rows, cols, codes.data(), scales.data());
  for (float& s : scales) s *= 4.0f;  // too large by a power of two: other codes, the same values below
  for (size_t i = 0; i < codes.size(); ++i)
    if ((codes[i] & 0x7f) < 0x20) codes[i] = 0;  // stay where four times fewer codes are still exact
  fp8_dequantize(codes.data(), rows, cols, 0, 0, scales.data(), 2, once.data());
  fp8_quantize(once.data(), rows, cols, codes.data(), scales.data());
  fp8_dequantize(codes.data(), rows, cols, 0, 0, scales.data(), 2, twice.data());
  EXPECT_EQ(once, twice);
}

TEST(Fp8, RefusesWhatIsNotFinite) {
  auto w = random_weights(4, 3);
  std::vector<uint8_t> codes(4);
  float scale;
  for (float bad : {std::nanf(""), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    w[2] = bad;
    expect_contains(refusal([&] { fp8_quantize(w.data(), 2, 2, codes.data(), &scale); }), "NaN or infinite");
  }
}

}  // namespace
}  // namespace dsa
