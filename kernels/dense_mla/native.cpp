#include "kernels/dense_mla/native.h"

#include <ATen/ops/empty.h>

#include "kernels/dense_mla/params.h"
#include "kernels/native.h"

namespace dsa::native {
namespace {

// As the copy engine takes it.
at::Tensor copyable(const at::Tensor& x) {
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  return aligned && x.stride(2) == 1 && x.stride(1) % 8 == 0 && x.stride(0) % 8 == 0 ? x : x.contiguous();
}

DenseMlaOperand operand(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

}  // namespace

bool dense_mla_supports(const at::Tensor& q_THD, const at::Tensor& v_SHV, const char** why_not) {
  *why_not = nullptr;
  if (!q_THD.is_cuda()) *why_not = "not on a GPU";
  else if (q_THD.scalar_type() != at::kBFloat16) *why_not = "the kernels take bf16";
  else if (q_THD.size(2) != 192 || v_SHV.size(2) != 128) *why_not = "head sizes other than 192/128";
  else {
    DenseMlaBackwardParams p;
    p.queries = q_THD.size(0), p.keys = v_SHV.size(0), p.heads = static_cast<int>(q_THD.size(1));
    sm90_supports(p, why_not);
  }
  return !*why_not;
}

reference::DenseMlaGradients dense_mla_backward(const at::Tensor& do_THV, const at::Tensor& q_THD, const at::Tensor& k_SHD,
                                                const at::Tensor& v_SHV, const at::Tensor& start_T, const at::Tensor& end_T,
                                                const at::Tensor& o_THV, const at::Tensor& lse_TH, double scale) {
  const at::Tensor q = copyable(q_THD), k = copyable(k_SHD), v = copyable(v_SHV), o = copyable(o_THV), d_o = copyable(do_THV);
  const at::Tensor lse = lse_TH.contiguous(), start = start_T.to(at::kInt).contiguous(), end = end_T.to(at::kInt).contiguous();
  const reference::DenseMlaGradients out{at::empty(q.sizes(), q.options()), at::empty(k.sizes(), k.options()),
                                         at::empty(v.sizes(), v.options())};
  DenseMlaBackwardParams p;
  p.queries = q.size(0), p.keys = k.size(0), p.heads = static_cast<int>(q.size(1)), p.scale = static_cast<float>(scale);
  p.q = operand(q), p.k = operand(k), p.v = operand(v), p.o = operand(o), p.d_o = operand(d_o);
  p.lse = lse.const_data_ptr<float>(), p.start = start.const_data_ptr<int32_t>(), p.end = end.const_data_ptr<int32_t>();
  p.dq = out.dq_THD.data_ptr(), p.dk = out.dk_SHD.data_ptr(), p.dv = out.dv_SHV.data_ptr();
  p.workspace_bytes = dense_mla_workspace_bytes(p.queries, p.heads);
  const at::Tensor workspace = at::empty({static_cast<int64_t>(p.workspace_bytes)}, q.options().dtype(at::kByte));
  p.workspace = workspace.data_ptr();
  p.stream = current_stream(q);
  launch_dense_mla_backward_sm90(p);
  return out;
}

}  // namespace dsa::native
