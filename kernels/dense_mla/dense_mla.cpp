// Checks and autograd; see dense_mla.h.
#include "kernels/dense_mla/dense_mla.h"

#include <torch/csrc/autograd/custom_function.h>

#include "kernels/check.h"
#include "kernels/dense_mla/cudnn.h"
#include "kernels/dense_mla/native.h"
#include "kernels/dense_mla/reference.h"
#include "kernels/native.h"

namespace dsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// cuDNN forward and our own kernels backward, or the reference for both.
bool on_gpu(const char* pass, const char* implementation, const at::Tensor& q_THD, const at::Tensor& v_SHV) {
  const char* why_not = nullptr;
  const bool yes = native::dense_mla_supports(q_THD, v_SHV, &why_not);
  ran(pass, yes ? implementation : std::string("reference (") + why_not + ")");
  return yes;
}

struct DenseMla : torch::autograd::Function<DenseMla> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q_THD, const at::Tensor& k_SHD,
                               const at::Tensor& v_SHV, const at::Tensor& start_T, const at::Tensor& end_T,
                               double scale, int64_t query_block, const DenseMlaOutput* known) {
    const bool cudnn = on_gpu("dense_mla", "cuDNN", q_THD, v_SHV);
    const DenseMlaOutput out =
        known   ? *known
        : cudnn ? cudnn::dense_mla_forward(q_THD.detach(), k_SHD.detach(), v_SHV.detach(), start_T, end_T, scale)
                : reference::dense_mla_forward(q_THD.detach(), k_SHD.detach(), v_SHV.detach(), start_T, end_T, scale, query_block);
    ctx->save_for_backward({q_THD, k_SHD, v_SHV, start_T, end_T, out.o_THV, out.lse_TH});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["query_block"] = query_block;
    ctx->mark_non_differentiable({out.lse_TH});
    return {out.o_THV, out.lse_TH};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(8);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor q = saved[0].detach(), k = saved[1].detach(), v = saved[2].detach(), o = saved[5].detach();
    const double scale = ctx->saved_data["scale"].toDouble();
    const auto d = on_gpu("dense_mla_backward", "sm90", q, v)
                       ? native::dense_mla_backward(grads[0], q, k, v, saved[3], saved[4], o, saved[6].detach(), scale)
                       : reference::dense_mla_backward(grads[0], q, k, v, saved[3], saved[4], o, saved[6].detach(), scale,
                                                       ctx->saved_data["query_block"].toInt());
    result[0] = d.dq_THD;
    result[1] = d.dk_SHD;
    result[2] = d.dv_SHV;
    return result;
  }
};

void check_keys(const at::Tensor& q_THD, const at::Tensor& k_SHD, const char* op) {
  require(q_THD.dim() == 3 && k_SHD.dim() == 3, "{}: q {} and k {} ([rows, heads, dim] is expected) reshape them", op,
          shape_of(q_THD), shape_of(k_SHD));
  require_shape(k_SHD, {k_SHD.size(0), q_THD.size(1), q_THD.size(2)}, op, "k");
  require_float(q_THD, op, "q");
  require(k_SHD.scalar_type() == q_THD.scalar_type(), "{}: q is {} and k {} (one dtype is expected) convert one", op,
          toString(q_THD.scalar_type()), toString(k_SHD.scalar_type()));
}

}  // namespace

DenseMlaOutput dense_mla(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& v_SHV,
                         const at::Tensor& start_T, const at::Tensor& end_T, double scale, int64_t query_block,
                         const DenseMlaOutput* known) {
  check_keys(q_THD, k_SHD, "dense_mla");
  require(v_SHV.dim() == 3, "dense_mla: v has shape {} ([keys, heads, dim] is expected) reshape it", shape_of(v_SHV));
  require_shape(v_SHV, {k_SHD.size(0), q_THD.size(1), v_SHV.size(2)}, "dense_mla", "v");
  require(v_SHV.scalar_type() == q_THD.scalar_type(), "dense_mla: q is {} and v {} (one dtype is expected) convert one",
          toString(q_THD.scalar_type()), toString(v_SHV.scalar_type()));
  const auto out = DenseMla::apply(q_THD, k_SHD, v_SHV, start_T, end_T, scale, query_block, known);
  return {out[0], out[1]};
}

at::Tensor attention_mass(const at::Tensor& q_THD, const at::Tensor& k_SHD, const at::Tensor& lse_TH,
                          const at::Tensor& start_T, const at::Tensor& end_T, double scale) {
  check_keys(q_THD, k_SHD, "attention_mass");
  require_shape(lse_TH, {q_THD.size(0), q_THD.size(1)}, "attention_mass", "lse");
  return reference::attention_mass(q_THD.detach(), k_SHD.detach(), lse_TH.detach(), start_T, end_T, scale);
}

}  // namespace dsa
