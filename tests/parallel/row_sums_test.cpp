// Sums of listed rows and their gradients against plain loops, on the CPU and, where there is one, on a GPU.
#include "parallel/row_sums.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <random>

#include "parallel/device.h"

namespace dsa {
namespace {

struct Lists {
  std::vector<int64_t> first{0}, row;
};

// Lists of 0 to 5 rows out of `sources`.
Lists random_lists(int64_t targets, int64_t sources, std::mt19937& random) {
  Lists out;
  for (int64_t t = 0; t < targets; ++t) {
    for (uint32_t n = random() % 6; n > 0; --n) out.row.push_back(static_cast<int64_t>(random() % sources));
    out.first.push_back(static_cast<int64_t>(out.row.size()));
  }
  return out;
}

at::Tensor values(at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
  return at::randn(sizes, at::kDouble).to(type).to(device);  // one stream of numbers, whatever the device
}
at::Tensor on_host(const at::Tensor& x) { return x.cpu().to(at::kDouble).contiguous(); }

void expect_near(const at::Tensor& got, const std::vector<double>& want, double relative, const std::string& what) {
  const at::Tensor host = on_host(got);
  ASSERT_EQ(host.numel(), static_cast<int64_t>(want.size())) << what;
  for (size_t i = 0; i < want.size(); ++i)
    ASSERT_NEAR(host.data_ptr<double>()[i], want[i], relative * (1 + std::abs(want[i]))) << what << " at " << i;
}

class RowSums : public testing::TestWithParam<at::ScalarType> {
 protected:
  // Also odd widths, and those of which 16 bytes are no multiple.
  template <typename F>
  void everywhere(F f) {
    std::vector<at::Device> devices{at::kCPU};
    if (visible_gpus() > 0) devices.push_back(open_gpu(0, 1));
    for (const at::Device device : devices)
      for (const int64_t width : {1, 7, 64, 2056}) f(device, width);
  }
  double rounding() const { return GetParam() == at::kBFloat16 ? 0x1p-8 : GetParam() == at::kFloat ? 1e-5 : 1e-13; }
};

TEST_P(RowSums, AddsWhatTheListsName) {
  std::mt19937 random(1);
  everywhere([&](at::Device device, int64_t width) {
    const int64_t targets = 133, sources = 90;
    const Lists lists = random_lists(targets, sources, random);
    const at::Tensor x = values({sources, width}, GetParam(), device), w = values({sources}, at::kFloat, device);
    const at::Tensor first = at::tensor(lists.first).to(device), row = at::tensor(lists.row).to(device);
    const at::Tensor host = on_host(x), weight = on_host(w);
    for (const bool weighted : {false, true}) {
      std::vector<double> want(targets * width);
      for (int64_t t = 0; t < targets; ++t)
        for (int64_t i = lists.first[t]; i < lists.first[t + 1]; ++i)
          for (int64_t c = 0; c < width; ++c)
            want[t * width + c] += (weighted ? weight.data_ptr<double>()[lists.row[i]] : 1) * host.data_ptr<double>()[lists.row[i] * width + c];
      const at::Tensor got = row_sums(x, first, row, weighted ? w : at::Tensor());
      EXPECT_EQ(got.scalar_type(), GetParam());
      expect_near(got, want, rounding(), device.str() + ", width " + std::to_string(width));
    }
  });
}

TEST_P(RowSums, ScalesRowsAndMultipliesThem) {
  std::mt19937 random(2);
  everywhere([&](at::Device device, int64_t width) {
    const int64_t rows = 77, sources = 20;
    std::vector<int64_t> of;
    for (int64_t m = 0; m < rows; ++m) of.push_back(static_cast<int64_t>(random() % sources));
    const at::Tensor g = values({sources, width}, GetParam(), device), y = values({rows, width}, GetParam(), device);
    const at::Tensor w = values({rows}, at::kFloat, device);
    const at::Tensor host_g = on_host(g), host_y = on_host(y), host_w = on_host(w);
    std::vector<double> want(rows * width), want_dot(rows);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t c = 0; c < width; ++c) {
        const double value = host_g.data_ptr<double>()[of[m] * width + c];
        want[m * width + c] = host_w.data_ptr<double>()[m] * value;
        want_dot[m] += value * host_y.data_ptr<double>()[m * width + c];
      }
    const auto [out, dot] = scaled_rows(g, at::tensor(of).to(device), w, y);
    EXPECT_EQ(out.scalar_type(), GetParam());
    EXPECT_EQ(dot.scalar_type(), at::kFloat);
    expect_near(out, want, rounding(), device.str());
    expect_near(dot, want_dot, 1e-4, device.str() + ", products");
  });
}

TEST_P(RowSums, NothingToAdd) {
  const at::Tensor x = values({3, 8}, GetParam(), at::kCPU), none = at::empty({0}, at::kLong);
  EXPECT_EQ(row_sums(x, at::tensor({int64_t{0}}), none).size(0), 0);
  const at::Tensor zeros = row_sums(x, at::tensor({int64_t{0}, int64_t{0}}), none);
  EXPECT_EQ(zeros.abs().sum().item<double>(), 0);
  EXPECT_EQ(zeros.size(0), 1);
}

INSTANTIATE_TEST_SUITE_P(Types, RowSums, testing::Values(at::kDouble, at::kFloat, at::kBFloat16));

TEST(RowSumsOfIntegers, AreRefused) {
  EXPECT_THROW(row_sums(at::empty({2, 2}, at::kLong), at::tensor({int64_t{0}}), at::empty({0}, at::kLong)), std::invalid_argument);
}

}  // namespace
}  // namespace dsa
