// See packed.h.
#include "kernels/packed/packed.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

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
  if (!tile_BX.is_cpu()) {
    const at::Tensor end = at::from_blob(const_cast<int64_t*>(ranges.end.data()) + block.row_begin, {rows}, at::kLong);
    const at::Tensor key = at::arange(begin, block.key_end, tile_BX.options().dtype(at::kLong));
    tile_BX.narrow(-1, begin - block.key_begin, columns).masked_fill_(key >= end.to(tile_BX.device()).unsqueeze(1), value);
    return;
  }
  at::Tensor outside = at::empty({rows, columns}, at::kBool);
  bool* flag = outside.data_ptr<bool>();
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t end = ranges.end[block.row_begin + r];
    for (int64_t c = 0; c < columns; ++c) *flag++ = begin + c >= end;
  }
  tile_BX.narrow(-1, begin - block.key_begin, columns).masked_fill_(outside, value);
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

at::ScalarType accumulation_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace dsa
