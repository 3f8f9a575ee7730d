#include "kernels/sparse_mla/native.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>

#include "kernels/native.h"
#include "kernels/quantum.h"
#include "kernels/sparse_mla/params.h"

namespace dsa::native {
namespace {

constexpr int64_t kWorkspaceRows = 1024;

QuantumGuesses quantum;

void describe(SparseMlaParams& p, const at::Tensor& q_THE, const at::Tensor& kv_SE, const at::Tensor& indices_TK,
              const at::Tensor& lengths_T, double scale) {
  p.queries = q_THE.size(0);
  p.heads = static_cast<int>(q_THE.size(1));
  p.keys = kv_SE.size(0);
  p.k = static_cast<int>(indices_TK.size(1));
  p.scale = static_cast<float>(scale);
  p.q = q_THE.const_data_ptr();
  p.q_stride = q_THE.stride(0);
  p.kv = kv_SE.const_data_ptr();
  p.kv_stride = kv_SE.stride(0);
  p.indices = indices_TK.const_data_ptr<int32_t>();
  p.indices_stride = indices_TK.stride(0);
  p.lengths = lengths_T.const_data_ptr<int32_t>();
  p.stream = current_stream(q_THE);
}

}  // namespace

bool sparse_mla_supports(const at::Tensor& q_THE, const at::Tensor& kv_SE, const at::Tensor& indices_TK, int64_t latent,
                         const char** why_not) {
  *why_not = nullptr;
  if (!q_THE.is_cuda()) *why_not = "not on a GPU";
  else if (q_THE.scalar_type() != at::kBFloat16) *why_not = "the kernels take bf16";
  else if (q_THE.size(2) != 576 || latent != 512) *why_not = "latent and rope sizes other than 512 + 64";
  else if (q_THE.size(1) > 128) *why_not = "more than 128 heads";
  else if (indices_TK.size(1) % 64 || indices_TK.size(1) > 4096) *why_not = "top_k must be a multiple of 64, at most 4096";
  else if (kv_SE.size(0) == 0 || q_THE.size(0) == 0) *why_not = "no rows";
  return !*why_not;
}

SparseMlaOutput sparse_mla_forward(const at::Tensor& q_THE, const at::Tensor& kv_SE, const at::Tensor& indices_TK,
                                   const at::Tensor& lengths_T, double scale) {
  const at::Tensor q = q_THE.contiguous(), kv = kv_SE.contiguous(), indices = indices_TK.contiguous();
  const int64_t T = q.size(0), H = q.size(1);
  SparseMlaOutput out{at::empty({T, H, 512}, q.options()), at::empty({T, H}, q.options().dtype(at::kFloat)), {}};
  SparseMlaForwardParams p;
  describe(p, q, kv, indices, lengths_T, scale);
  p.o = out.o_THC.data_ptr();
  p.lse = out.lse_TH.data_ptr<float>();
  launch_sparse_mla_forward_sm90(p);
  return out;
}

reference::SparseMlaGradients sparse_mla_backward(const at::Tensor& do_THC, const at::Tensor& q_THE, const at::Tensor& kv_SE,
                                                  const at::Tensor& indices_TK, const at::Tensor& lengths_T,
                                                  const at::Tensor& o_THC, const at::Tensor& lse_TH, double scale, int64_t site) {
  const at::Tensor q = q_THE.contiguous(), kv = kv_SE.contiguous(), indices = indices_TK.contiguous();
  const at::Tensor d_o = do_THC.contiguous(), o = o_THC.contiguous(), lse = lse_TH.contiguous();
  const int64_t T = q.size(0), H = q.size(1), S = kv.size(0);
  const auto fp32 = q.options().dtype(at::kFloat);
  reference::SparseMlaGradients out{at::empty_like(q), at::empty_like(kv), at::empty({T, indices.size(1)}, fp32)};
  const at::Tensor delta = at::empty({T, H}, fp32), report = at::empty({2}, q.options().dtype(at::kInt)),
                   sum = at::empty({sparse_mla_sum_bytes(S) / 8}, q.options().dtype(at::kLong));

  SparseMlaBackwardParams p;
  describe(p, q, kv, indices, lengths_T, scale);
  p.d_o = d_o.const_data_ptr();
  p.d_o_stride = d_o.stride(0);
  p.lse = lse.const_data_ptr<float>();
  p.delta = delta.const_data_ptr<float>();
  p.dq = out.dq_THE.data_ptr();
  p.p_sel = out.mass_TK.data_ptr<float>();
  p.dkv_sum = reinterpret_cast<uint64_t*>(sum.data_ptr<int64_t>());
  p.workspace_bytes = sparse_mla_workspace_bytes(p, std::min(T, kWorkspaceRows));
  const at::Tensor workspace = at::empty({static_cast<int64_t>(p.workspace_bytes)}, q.options().dtype(at::kByte));
  p.workspace = workspace.data_ptr();
  launch_sparse_mla_delta_sm90(p, o.const_data_ptr(), delta.data_ptr<float>());
  const bool finite = quantum.run(site, [&](float q) {
    sum.zero_();
    p.quantum = q;
    launch_sparse_mla_backward_sm90(p);
    launch_sparse_mla_finish_sm90(p.dkv_sum, S, q, out.dkv_SE.data_ptr(), /*bf16=*/true,
                                  reinterpret_cast<QuantumReport*>(report.data_ptr<int32_t>()), p.stream);
    const at::Tensor host = report.cpu();
    const auto* words = host.const_data_ptr<int32_t>();
    return QuantumReport{static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1])};
  });
  if (!finite) out.dkv_SE.fill_(std::numeric_limits<float>::quiet_NaN());
  out.mass_TK.mul_(static_cast<double>(H));
  return out;
}

}  // namespace dsa::native
