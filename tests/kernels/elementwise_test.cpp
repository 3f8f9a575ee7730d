// Rotation, norms, Hadamard, FP8 and SwiGLU against golden data, plain loops and finite differences.
#include <cmath>

#include "kernels/fp8_quant/fp8_quant.h"
#include "kernels/grouped_mlp/grouped_mlp.h"
#include "kernels/hadamard/hadamard.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/rope/rope.h"
#include "tests/support/golden.h"
#include "tests/support/tensors.h"

namespace dsa {
namespace {

TEST(Rope, TableIsThatOfTransformers) {
  const Golden golden("rope");
  const at::Tensor positions = golden["positions"].to(at::kLong);
  EXPECT_LE(relative_distance(rope_frequencies({}, at::kDouble), golden["inv_freq.f64"]), 1e-15);
  const RopeTable exact = rope_table(positions, {}, at::kDouble);
  EXPECT_LE(relative_distance(exact.cos_TR2, golden["cos.f64"]), 1e-11);
  EXPECT_LE(relative_distance(exact.sin_TR2, golden["sin.f64"]), 1e-11);
  // The roundings of the fp32 steps are part of the released models: bit-equal frequencies, not just near.
  EXPECT_TRUE(at::equal(rope_frequencies({}, at::kFloat), golden["inv_freq.f32"]));
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const RopeTable table = rope_table(positions, {}, type);
    EXPECT_EQ(table.cos_TR2.scalar_type(), at::kFloat);
    EXPECT_LE(relative_distance(table.cos_TR2, golden["cos.f32"]), 1.2e-7);
    EXPECT_LE(relative_distance(table.sin_TR2, golden["sin.f32"]), 1.2e-7);
  }
  EXPECT_GT(relative_distance(golden["cos.f32"], golden["cos.f64"]), 1e-3);  // the two precisions do differ
}

TEST(Rope, RotationsAreThoseOfTransformers) {
  const Golden golden("rope");
  const RopeTable table{golden["cos.f64"], golden["sin.f64"]};
  for (const char* x : {"q", "k"}) {
    const at::Tensor input = golden[std::string("x.") + x];
    EXPECT_LE(relative_distance(apply_rope(input, table, RopeLayout::HALF), golden[std::string("half.") + x]), 1e-14);
    // transformers writes evens first, then odds; we write interleaved.
    const at::Tensor ours = apply_rope(input, table, RopeLayout::INTERLEAVED).unflatten(-1, {32, 2}).transpose(-1, -2).flatten(-2);
    EXPECT_LE(relative_distance(ours, golden[std::string("interleaved.") + x]), 1e-14);
  }
}

TEST(Rope, GradientAndPlainFrequencies) {
  RopeParameters parameters;
  parameters.dim = 6;
  const RopeTable table = rope_table(at::arange(5) * 7, parameters, at::kDouble);
  for (const auto layout : {RopeLayout::HALF, RopeLayout::INTERLEAVED}) {
    expect_gradients([&](const auto& in) { return apply_rope(in[0], table, layout); }, {random_tensor({5, 2, 6}, 1)});
  }
  parameters.yarn = false;
  const at::Tensor plain = rope_frequencies(parameters, at::kDouble);
  for (int i = 0; i < 3; ++i) EXPECT_NEAR(plain[i].item<double>(), std::pow(10000.0, -2.0 * i / 6), 1e-15);
  EXPECT_THROW(apply_rope(random_tensor({4, 6}, 1), table, RopeLayout::HALF), std::invalid_argument);
}

TEST(Norm, FormulaGradientAndMixedWeight) {
  const at::Tensor x = random_tensor({4, 3, 10}, 2) * 0.02, w = random_tensor({10}, 3), b = random_tensor({10}, 4);
  const at::Tensor rms = rms_norm(x, w, 1e-6), layer = layer_norm(x, w, b, 1e-6);
  for (int i = 0; i < 12; ++i) {
    const double* row = x.data_ptr<double>() + 10 * i;
    double square = 0, mean = 0, variance = 0;
    for (int d = 0; d < 10; ++d) square += row[d] * row[d] / 10, mean += row[d] / 10;
    for (int d = 0; d < 10; ++d) variance += (row[d] - mean) * (row[d] - mean) / 10;
    for (int d = 0; d < 10; ++d) {
      const double weight = w[d].item<double>();
      EXPECT_NEAR(rms.data_ptr<double>()[10 * i + d], weight * row[d] / std::sqrt(square + 1e-6), 1e-13);
      EXPECT_NEAR(layer.data_ptr<double>()[10 * i + d], weight * (row[d] - mean) / std::sqrt(variance + 1e-6) + b[d].item<double>(), 1e-13);
    }
  }
  expect_gradients([](const auto& in) { return rms_norm(in[0], in[1], 1e-6); }, {x, w}, 1e-6);
  expect_gradients([](const auto& in) { return layer_norm(in[0], in[1], in[2], 1e-6); }, {x, w, b}, 1e-6);
  // bf16 x with fp32 weight: one rounding of the exact result of the rounded input.
  const at::Tensor half = x.to(at::kBFloat16);
  const at::Tensor mixed = rms_norm(half, w.to(at::kFloat), 1e-6);
  EXPECT_EQ(mixed.scalar_type(), at::kBFloat16);
  EXPECT_LE(relative_distance(mixed, rms_norm(half.to(at::kDouble), w, 1e-6)), 1.0 / 256);
}

TEST(Hadamard, SylvesterOrthonormalSymmetric) {
  const at::Tensor x = random_tensor({3, 8}, 5), y = hadamard(x);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 8; ++j) {
      double sum = 0;
      for (int k = 0; k < 8; ++k) {
        int sign = 1;
        for (int bit = 1; bit < 8; bit *= 2) sign *= (j & bit) && (k & bit) ? -1 : 1;
        sum += sign * x[i][k].item<double>();
      }
      EXPECT_NEAR(y[i][j].item<double>(), sum / std::sqrt(8.0), 1e-14);
    }
  }
  EXPECT_LE(relative_distance(hadamard(y), x), 1e-14);
  expect_gradients([](const auto& in) { return hadamard(in[0]); }, {x});
  EXPECT_THROW(hadamard(random_tensor({2, 6}, 1)), std::invalid_argument);
}

TEST(Fp8, CodesAndScalesAreExact) {
  const Golden golden("fp8_vectors");
  const at::Tensor decoded = at::arange(256, at::kByte).view(at::kFloat8_e4m3fn).to(at::kFloat), expected = golden["decode"];
  EXPECT_TRUE(at::equal(decoded.isnan(), expected.isnan()));
  EXPECT_TRUE(at::equal(decoded.nan_to_num(), expected.nan_to_num()));
  EXPECT_TRUE(at::equal(fp8_scale(golden["ue8m0.amax"], ScaleFormat::POWER_OF_TWO), golden["ue8m0.scale"]));
  // Two vectors of 1030 + 1 values; the last one forces amax 448, so the scale is 1.
  const at::Tensor x = at::cat({golden["encode.x"].clamp(-448, 448), at::full({1}, 448.0, at::kFloat)});
  for (const auto format : {ScaleFormat::POWER_OF_TWO, ScaleFormat::PLAIN}) {
    const Fp8Tensor q = act_quant(x, format, 1031);
    EXPECT_EQ(q.scale.item<float>(), 1.0f);
    EXPECT_TRUE(at::equal(q.codes.view(at::kByte).narrow(0, 0, 1030), golden["encode.code"]));
  }
}

TEST(Fp8, FakeQuantiseIsStraightThrough) {
  at::Tensor x = random_tensor({3, 256}, 6).to(at::kBFloat16).requires_grad_(true);
  const at::Tensor y = fake_quantise(x);
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(y.to(at::kFloat), act_dequant(act_quant(x))));  // exact in bf16
  EXPECT_LE((y - x).abs().max().item<double>(), x.abs().max().item<double>() / 16);
  EXPECT_GT((y - x).abs().max().item<double>(), 0);
  const at::Tensor weights = random_tensor({3, 256}, 7).to(at::kBFloat16);
  (y * weights).sum().backward();
  EXPECT_TRUE(at::equal(x.grad(), weights));
  EXPECT_EQ(act_quant(at::zeros({128})).scale.item<float>(), std::exp2(-22.0f));
  EXPECT_THROW(act_quant(at::zeros({100})), std::invalid_argument);
}

TEST(GroupedSwiglu, EqualsOneExpertAtATimeAndDifferences) {
  const std::vector<int64_t> rows{3, 0, 4};
  const at::Tensor x = random_tensor({7, 5}, 8), gate = random_tensor({3, 6, 5}, 9), up = random_tensor({3, 6, 5}, 10),
                   down = random_tensor({3, 5, 6}, 11);
  const at::Tensor y = grouped_swiglu(x, rows, gate, up, down);
  for (int m = 0; m < 7; ++m) {
    const int e = m < 3 ? 0 : 2;
    for (int h = 0; h < 5; ++h) {
      double sum = 0;
      for (int i = 0; i < 6; ++i) {
        const double g = (gate[e][i] * x[m]).sum().item<double>(), u = (up[e][i] * x[m]).sum().item<double>();
        sum += down[e][h][i].item<double>() * g / (1 + std::exp(-g)) * u;
      }
      EXPECT_NEAR(y[m][h].item<double>(), sum, 1e-12);
    }
  }
  expect_gradients([&](const auto& in) { return grouped_swiglu(in[0], rows, in[1], in[2], in[3]); }, {x, gate, up, down}, 1e-6);
  expect_gradients([&](const auto& in) { return swiglu_mlp(in[0], in[1], in[2], in[3]); },
                   {x.view({1, 7, 5}), gate[0], up[0], down[0]}, 1e-6);
  // The first half alone.
  const at::Tensor hidden = swiglu_hidden(x, gate[0], up[0]);
  EXPECT_LT(relative_distance(hidden.matmul(down[0].t()), swiglu_mlp(x, gate[0], up[0], down[0])), 1e-13);
  expect_gradients([&](const auto& in) { return swiglu_hidden(in[0], in[1], in[2]); }, {x, gate[0], up[0]}, 1e-6);
  EXPECT_THROW(swiglu_hidden(x, gate[0], up[0].t()), std::invalid_argument);
  // The expert without rows has a gradient, and it is zero.
  at::Tensor weight = gate.clone().requires_grad_(true);
  grouped_swiglu(x, rows, weight, up, down).sum().backward();
  EXPECT_EQ(weight.grad()[1].abs().max().item<double>(), 0);
  EXPECT_GT(weight.grad()[2].abs().max().item<double>(), 0);
  // No rows at all.
  EXPECT_EQ(grouped_swiglu(x.narrow(0, 0, 0), {0, 0, 0}, gate, up, down).size(0), 0);
  EXPECT_THROW(grouped_swiglu(x, {3, 0, 3}, gate, up, down), std::invalid_argument);
}

}  // namespace
}  // namespace dsa
