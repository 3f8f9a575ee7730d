// See packed.h.
#include "kernels/packed/packed.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>

#include "kernels/check.h"

namespace dsa {
namespace {

std::vector<int64_t> host_numbers(const at::Tensor& x, int64_t rows, const char* name) {
  require_shape(x, {rows}, "key ranges", name);
  require(x.scalar_type() == at::kInt || x.scalar_type() == at::kLong,
          "key ranges: {} has dtype {} (int32 or int64 is expected) convert it first", name, toString(x.scalar_type()));
  const at::Tensor host = x.to(at::kCPU, at::kLong).contiguous();
  const int64_t* data = host.const_data_ptr<int64_t>();
  return {data, data + rows};
}

// Columns a thread owns in add_outer_products. Fixed, so that sums do not depend on the number of threads.
constexpr int64_t kOwnedColumns = 64;
constexpr int64_t kProductElements = 64 << 10;  // of one tile of products: stays in L2

template <typename scalar_t>
void add_rows(const at::Tensor& table_SE, const at::Tensor& product_GKC, const int64_t* index_GK, int64_t column) {
  const int64_t rows = product_GKC.size(0) * product_GKC.size(1), columns = product_GKC.size(2);
  const int64_t stride = table_SE.stride(0);
  const scalar_t* from = product_GKC.const_data_ptr<scalar_t>();
  scalar_t* table = table_SE.data_ptr<scalar_t>() + column;
  for (int64_t i = 0; i < rows; ++i, from += columns) {
    if (index_GK[i] < 0) continue;
    scalar_t* to = table + index_GK[i] * stride;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) to[c] += from[c];
  }
}

}  // namespace

KeyRanges::KeyRanges(const at::Tensor& start_T, const at::Tensor& end_T, int64_t rows, int64_t keys)
    : start(host_numbers(start_T, rows, "start")), end(host_numbers(end_T, rows, "end")) {
  for (int64_t t = 0; t < rows; ++t) {
    if (start[t] >= end[t]) {
      start[t] = end[t] = 0;
      continue;
    }
    require(start[t] >= 0 && end[t] <= keys,
            "row {} sees keys [{}, {}) (the stream has {} keys) give ranges inside the stream", t, start[t], end[t], keys);
  }
}

std::vector<RowBlock> row_blocks(const KeyRanges& ranges, int64_t query_block) {
  require(query_block >= 1, "query_block is {} (a score tile needs at least one row) choose 1 or more", query_block);
  const int64_t rows = static_cast<int64_t>(ranges.start.size());
  std::vector<RowBlock> blocks;
  for (int64_t first = 0; first < rows;) {
    int64_t last = first + 1;
    while (last < rows && last - first < query_block && ranges.start[last] == ranges.start[first]) ++last;
    const auto [low, high] = std::minmax_element(ranges.end.begin() + first, ranges.end.begin() + last);
    // One start a block; a row without keys makes the common interval empty.
    blocks.push_back({first, last, ranges.start[first], std::max(*high, ranges.start[first]), *low});
    first = last;
  }
  return blocks;
}

void fill_outside(const at::Tensor& tile_BX, const RowBlock& block, const KeyRanges& ranges, double value) {
  const int64_t begin = std::max(block.common_end, block.key_begin), columns = block.key_end - begin;
  if (columns <= 0) return;
  const int64_t rows = block.row_end - block.row_begin;
  at::Tensor outside = at::empty({rows, columns}, at::kBool);
  bool* flag = outside.data_ptr<bool>();
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t end = ranges.end[block.row_begin + r];
    for (int64_t c = 0; c < columns; ++c) *flag++ = begin + c >= end;
  }
  tile_BX.narrow(-1, begin - block.key_begin, columns).masked_fill_(outside.to(tile_BX.device()), value);
}

void for_each_block(int64_t count, at::Device device, const std::function<void(int64_t)>& body) {
  if (!device.is_cpu() || count <= 1) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  // Threads draw the next block when they are free; the last first: under causality it is the longest.
  std::atomic<int64_t> drawn{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t i = drawn++; i < count; i = drawn++) body(count - 1 - i);
  });
}

void add_outer_products(const at::Tensor& table_SE, const at::Tensor& left_BMK, const at::Tensor& right_BME,
                        const at::Tensor& indices_BK) {
  const int64_t B = left_BMK.size(0), M = left_BMK.size(1), K = left_BMK.size(2), E = table_SE.size(1);
  require_shape(right_BME, {B, M, E}, "add_outer_products", "right");
  require_shape(indices_BK, {B, K}, "add_outer_products", "indices");
  if (B * K == 0) return;
  if (!table_SE.is_cpu()) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor flat = indices_BK.reshape({-1}).to(at::kLong);
    const at::Tensor products = at::bmm(left_BMK.transpose(1, 2), right_BME).view({B * K, E});
    products.masked_fill_((flat < 0).unsqueeze(1), 0);
    table_SE.index_add_(0, flat.clamp_min(0), products);
    return;
  }
  const at::Tensor indices = indices_BK.to(at::kLong).contiguous();
  const int64_t* index = indices.const_data_ptr<int64_t>();
  for_each_block((E + kOwnedColumns - 1) / kOwnedColumns, table_SE.device(), [&](int64_t chunk) {
    const int64_t column = chunk * kOwnedColumns, columns = std::min(kOwnedColumns, E - column);
    const int64_t group = std::clamp<int64_t>(kProductElements / (K * columns), 1, B);
    for (int64_t b = 0; b < B; b += group) {
      const int64_t n = std::min(group, B - b);
      const at::Tensor product =
          at::bmm(left_BMK.narrow(0, b, n).transpose(1, 2), right_BME.narrow(0, b, n).narrow(2, column, columns));
      if (product.scalar_type() == at::kDouble) {
        add_rows<double>(table_SE, product, index + b * K, column);
      } else {
        add_rows<float>(table_SE, product, index + b * K, column);
      }
    }
  });
}

at::ScalarType accumulation_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace dsa
