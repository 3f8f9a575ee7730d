#include "parallel/pieces.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>

namespace dsa {

at::Tensor combine_in_rank_order(const std::vector<at::Tensor>& pieces, Reduction reduction) {
  const at::Tensor& first = pieces.front();
  if (pieces.size() == 1) return first.clone();
  if (reduction != Reduction::SUM) {
    at::Tensor most = first;
    for (size_t r = 1; r < pieces.size(); ++r)
      most = reduction == Reduction::MAX ? at::maximum(most, pieces[r]) : at::minimum(most, pieces[r]);
    return most;
  }
  if (pieces.size() == 2) return at::add(first, pieces[1]);  // LibTorch adds two half precision numbers in fp32
  const auto dtype = first.scalar_type();
  const bool half = dtype == at::kBFloat16 || dtype == at::kHalf;
  at::Tensor sum = half ? first.to(at::kFloat).add_(pieces[1]) : at::add(first, pieces[1]);
  for (size_t r = 2; r + 1 < pieces.size(); ++r) sum.add_(pieces[r]);
  if (!half) return sum.add_(pieces.back());
  at::Tensor rounded = at::empty_like(first);
  at::add_out(rounded, sum, pieces.back());  // the last addition rounds
  return rounded;
}

int64_t row_bytes(const at::Tensor& x) {
  int64_t bytes = static_cast<int64_t>(x.element_size());
  for (int64_t d = 1; d < x.dim(); ++d) bytes *= x.size(d);
  return bytes;
}

at::Tensor rows_like(const at::Tensor& x, int64_t rows) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape[0] = rows;
  return at::empty(shape, x.options());
}

std::string describe_call(const char* call, const at::Tensor& x, bool rows_may_differ) {
  std::string text = std::string(call) + " of " + c10::toString(x.scalar_type()) + " [";
  for (int64_t d = 0; d < x.dim(); ++d)
    text += (d ? ", " : "") + (d == 0 && rows_may_differ ? std::string("*") : std::to_string(x.size(d)));
  return text + "]";
}

std::string describe_call(Reduction reduction, const at::Tensor& x) {
  static constexpr const char* kCalls[] = {"all_reduce SUM", "all_reduce MAX", "all_reduce MIN"};
  return describe_call(kCalls[static_cast<int>(reduction)], x);
}

}  // namespace dsa
