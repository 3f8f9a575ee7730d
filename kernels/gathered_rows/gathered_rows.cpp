// See gathered_rows.h.
#include "kernels/gathered_rows/gathered_rows.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "kernels/check.h"
#include "kernels/gathered_rows/tiles.h"
#include "kernels/packed/packed.h"

namespace dsa {
namespace {

constexpr int64_t kOwnedColumns = 64;  // of the table, owned by one thread at a time; fixed, not per number of threads

// The index lists of some query rows without their missing places.
class Lists {
 public:
  Lists(const at::Tensor& index_BK, const at::Tensor& table_SE) : K_(index_BK.size(1)) {
    const at::Tensor index = index_BK.to(at::kLong).contiguous();
    const int64_t* row = index.const_data_ptr<int64_t>();
    const int64_t B = index.size(0), S = table_SE.size(0), stride = table_SE.stride(0);
    offset_.resize(B * K_);
    place_.resize(B * K_);
    count_.resize(B);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = 0; i < K_; ++i, ++row) {
        if (*row < 0) continue;
        require(*row < S, "gathered rows: index {} names no row (the table has {}) give lists of this stream", *row, S);
        offset_[b * K_ + count_[b]] = *row * stride;
        place_[b * K_ + count_[b]++] = i;
      }
    }
  }
  tiles::List operator[](int64_t b) const { return {offset_.data() + b * K_, place_.data() + b * K_, count_[b]}; }

 private:
  int64_t K_;
  std::vector<int64_t> offset_, place_, count_;
};

// Rows of a table for other devices; missing ones read row 0.
at::Tensor gather(const at::Tensor& table_SE, const at::Tensor& index_BK) {
  return table_SE.index_select(0, index_BK.clamp_min(0).reshape({-1}))
      .view({index_BK.size(0), index_BK.size(1), table_SE.size(1)});
}

void check(const at::Tensor& x, const at::Tensor& table_SE, const char* op) {
  require(x.scalar_type() == table_SE.scalar_type() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
          "{}: factor is {} and table {} (both fp32 or both fp64 are expected) convert them", op, toString(x.scalar_type()),
          toString(table_SE.scalar_type()));
  require(table_SE.stride(1) == 1, "{}: the table's channels are strided (rows are read whole) make it contiguous", op);
}

template <typename Body>
void for_dtype(const at::Tensor& x, const Body& body) {
  if (x.scalar_type() == at::kDouble) {
    body(double{});
  } else {
    body(float{});
  }
}

}  // namespace

at::Tensor gathered_dots(const at::Tensor& left_BMW, const at::Tensor& table_SE, const at::Tensor& index_BK) {
  check(left_BMW, table_SE, "gathered_dots");
  const int64_t B = left_BMW.size(0), M = left_BMW.size(1), W = left_BMW.size(2), K = index_BK.size(1);
  if (!table_SE.is_cpu()) {
    return at::bmm(left_BMW, gather(table_SE.narrow(1, 0, W), index_BK).transpose(1, 2))
        .masked_fill_((index_BK < 0).unsqueeze(1), 0);
  }
  const Lists lists(index_BK, table_SE);
  const at::Tensor left = left_BMW.stride(2) == 1 ? left_BMW : left_BMW.contiguous();
  at::Tensor out = at::zeros({B, M, K}, left.options());
  for_dtype(left, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t b = 0; b < B; ++b) {
      tiles::dots(left.const_data_ptr<T>() + b * left.stride(0), left.stride(1), M, table_SE.const_data_ptr<T>(), lists[b],
                  W, out.data_ptr<T>() + b * M * K, K);
    }
  });
  return out;
}

at::Tensor gathered_sums(const at::Tensor& weight_BMK, const at::Tensor& table_SE, const at::Tensor& index_BK, int64_t width) {
  check(weight_BMK, table_SE, "gathered_sums");
  const int64_t B = weight_BMK.size(0), M = weight_BMK.size(1), K = weight_BMK.size(2);
  if (!table_SE.is_cpu()) {
    return at::bmm(weight_BMK.masked_fill((index_BK < 0).unsqueeze(1), 0), gather(table_SE.narrow(1, 0, width), index_BK));
  }
  const Lists lists(index_BK, table_SE);
  const at::Tensor weight = weight_BMK.contiguous();
  at::Tensor out = at::empty({B, M, width}, weight.options());
  for_dtype(weight, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t b = 0; b < B; ++b) {
      tiles::sums(weight.const_data_ptr<T>() + b * M * K, K, M, table_SE.const_data_ptr<T>(), lists[b], width,
                  out.data_ptr<T>() + b * M * width, width);
    }
  });
  return out;
}

void add_outer_products(const at::Tensor& table_SE, const at::Tensor& left_BMK, const at::Tensor& right_BME,
                        const at::Tensor& index_BK) {
  check(left_BMK, table_SE, "add_outer_products");
  const int64_t B = left_BMK.size(0), M = left_BMK.size(1), K = left_BMK.size(2), E = table_SE.size(1);
  require_shape(right_BME, {B, M, E}, "add_outer_products", "right");
  require_shape(index_BK, {B, K}, "add_outer_products", "index");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!table_SE.is_cpu()) {
    const at::Tensor flat = index_BK.reshape({-1}).to(at::kLong);
    const at::Tensor products = at::bmm(left_BMK.transpose(1, 2), right_BME).view({B * K, E});
    table_SE.index_add_(0, flat.clamp_min(0), products.masked_fill_((flat < 0).unsqueeze(1), 0));
    return;
  }
  const Lists lists(index_BK, table_SE);
  const at::Tensor left = left_BMK.contiguous(), right = right_BME.contiguous();
  for_each_block((E + kOwnedColumns - 1) / kOwnedColumns, table_SE.device(), [&](int64_t chunk) {
    const int64_t column = chunk * kOwnedColumns, columns = std::min(kOwnedColumns, E - column);
    for_dtype(left, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t b = 0; b < B; ++b) {
        tiles::updates(left.const_data_ptr<T>() + b * M * K, K, M, right.const_data_ptr<T>() + b * M * E + column, E,
                       lists[b], columns, table_SE.data_ptr<T>() + column);
      }
    });
  });
}

}  // namespace dsa
