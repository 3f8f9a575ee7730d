#include "kernels/rope/native.h"

#include "kernels/native.h"
#include "kernels/rope/params.h"

namespace dsa::native {
namespace {

RopeParams describe(const at::Tensor& y, const at::Tensor& x, const RopeTable& table) {
  RopeParams p;
  p.rows = x.size(0);
  p.heads = x.dim() == 3 ? x.size(1) : 1;
  p.dim = static_cast<int>(x.size(-1));
  p.x = x.const_data_ptr();
  p.x_row = x.stride(0);
  p.x_head = x.dim() == 3 ? x.stride(1) : 0;
  p.y = y.data_ptr();
  p.y_row = y.stride(0);
  p.y_head = y.dim() == 3 ? y.stride(1) : 0;
  p.cos = table.cos_TR2.const_data_ptr<float>();
  p.sin = table.sin_TR2.const_data_ptr<float>();
  p.stream = current_stream(x);
  return p;
}

}  // namespace

bool rope_supports(const at::Tensor& y, const at::Tensor& x, const RopeTable& table, const char** why_not) {
  *why_not = nullptr;
  if (!x.is_cuda()) *why_not = "not on a GPU";
  else if (x.scalar_type() != at::kBFloat16 || table.cos_TR2.scalar_type() != at::kFloat)
    *why_not = "the kernel takes bf16 rows and an fp32 table";
  else if (x.dim() > 3 || x.stride(-1) != 1 || y.stride(-1) != 1)
    *why_not = "other than rows, heads and contiguous channels";
  else if (!table.cos_TR2.is_contiguous() || !table.sin_TR2.is_contiguous()) *why_not = "the table is not contiguous";
  else dsa::rope_supports(describe(y, x, table), why_not);
  return !*why_not;
}

void rope(const at::Tensor& y, const at::Tensor& x, const RopeTable& table, RopeLayout layout, bool inverse) {
  RopeParams p = describe(y, x, table);
  p.halves = layout == RopeLayout::HALF;
  p.inverse = inverse;
  launch_rope(p);
}

}  // namespace dsa::native
