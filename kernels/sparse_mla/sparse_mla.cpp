// Checks and autograd; see sparse_mla.h.
#include "kernels/sparse_mla/sparse_mla.h"

#include <torch/csrc/autograd/custom_function.h>

#include "kernels/check.h"
#include "kernels/native.h"
#include "kernels/sparse_mla/native.h"
#include "kernels/sparse_mla/reference.h"

namespace dsa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool uses_native(const at::Tensor& q_THE, const at::Tensor& kv_SE, const at::Tensor& indices_TK, int64_t latent) {
  const char* why_not = nullptr;
  const bool yes = native::sparse_mla_supports(q_THE, kv_SE, indices_TK, latent, &why_not);
  ran("sparse_mla", yes ? "sm90" : std::string("reference (") + why_not + ")");
  return yes;
}

struct Receiver : torch::CustomClassHolder {
  explicit Receiver(MassReceiver f) : receive(std::move(f)) {}
  MassReceiver receive;
};

struct SparseMla : torch::autograd::Function<SparseMla> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q_THE, const at::Tensor& kv_SE,
                               const at::Tensor& indices_TK, const at::Tensor& lengths_T, double scale, int64_t latent,
                               int64_t query_block, bool want_mass, const MassReceiver& receive_mass, int64_t site) {
    const bool native = uses_native(q_THE, kv_SE, indices_TK, latent);
    SparseMlaOutput out = native && !want_mass ? native::sparse_mla_forward(q_THE.detach(), kv_SE.detach(), indices_TK, lengths_T, scale)
                                               : reference::sparse_mla_forward(q_THE.detach(), kv_SE.detach(), indices_TK,
                                                                               lengths_T, scale, latent, query_block, want_mass);
    if (!want_mass) out.mass_TK = at::Tensor(out.lse_TH.new_empty({0}));
    ctx->save_for_backward({q_THE, kv_SE, indices_TK, lengths_T, out.o_THC, out.lse_TH});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["latent"] = latent;
    ctx->saved_data["query_block"] = query_block;
    ctx->saved_data["site"] = site;
    if (receive_mass) ctx->saved_data["receiver"] = c10::IValue::make_capsule(c10::make_intrusive<Receiver>(receive_mass));
    ctx->mark_non_differentiable({out.lse_TH, out.mass_TK});
    return {out.o_THC, out.lse_TH, out.mass_TK};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(10);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor q = saved[0].detach(), kv = saved[1].detach(), o = saved[4].detach(), lse = saved[5].detach();
    const double scale = ctx->saved_data["scale"].toDouble();
    const int64_t latent = ctx->saved_data["latent"].toInt();
    const auto d = uses_native(q, kv, saved[2], latent)
                       ? native::sparse_mla_backward(grads[0], q, kv, saved[2], saved[3], o, lse, scale, ctx->saved_data["site"].toInt())
                       : reference::sparse_mla_backward(grads[0], q, kv, saved[2], saved[3], o, lse, scale, latent,
                                                        ctx->saved_data["query_block"].toInt());
    if (const auto found = ctx->saved_data.find("receiver"); found != ctx->saved_data.end()) {
      const auto capsule = found->second.toCapsule();
      static_cast<Receiver&>(*capsule).receive(d.mass_TK);
    }
    result[0] = d.dq_THE;
    result[1] = d.dkv_SE;
    return result;
  }
};

}  // namespace

SparseMlaOutput sparse_mla(const at::Tensor& q_THE, const at::Tensor& kv_SE, const at::Tensor& indices_TK,
                           const at::Tensor& lengths_T, double scale, int64_t latent, int64_t query_block,
                           bool want_mass, MassReceiver receive_mass, int64_t site) {
  require(q_THE.dim() == 3 && kv_SE.dim() == 2 && indices_TK.dim() == 2,
          "sparse_mla: q {}, kv {}, indices {} ([T,H,E], [S,E], [T,K] are expected) reshape them", shape_of(q_THE),
          shape_of(kv_SE), shape_of(indices_TK));
  require_shape(kv_SE, {kv_SE.size(0), q_THE.size(2)}, "sparse_mla", "kv");
  require_shape(indices_TK, {q_THE.size(0), indices_TK.size(1)}, "sparse_mla", "indices");
  require_shape(lengths_T, {q_THE.size(0)}, "sparse_mla", "lengths");
  require_float(q_THE, "sparse_mla", "q");
  require(kv_SE.scalar_type() == q_THE.scalar_type(), "sparse_mla: q is {} and kv {} (one dtype is expected) convert one",
          toString(q_THE.scalar_type()), toString(kv_SE.scalar_type()));
  require(latent >= 1 && latent <= q_THE.size(2), "sparse_mla: latent is {} (keys have {} channels) give the value's width",
          latent, q_THE.size(2));
  require(query_block >= 1, "sparse_mla: query_block is {} (a block has at least one row) choose 1 or more", query_block);
  const auto out = SparseMla::apply(q_THE, kv_SE, indices_TK, lengths_T, scale, latent, query_block, want_mass, receive_mass, site);
  return {out[0], out[1], want_mass ? out[2] : at::Tensor()};
}

}  // namespace dsa
