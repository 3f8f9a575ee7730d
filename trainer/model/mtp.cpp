#include "trainer/model/mtp.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>

#include "kernels/rms_norm/rms_norm.h"

namespace dsa {
namespace {

std::string prefix_of(int64_t number) { return "model.layers." + std::to_string(number) + "."; }

}  // namespace

MtpModule::MtpModule(const ModelBuilder& builder, int64_t number, bool hadamard)
    : eps_(builder.config.rms_norm_eps),
      enorm_(builder.vector(prefix_of(number) + "enorm.weight", builder.config.hidden_size)),
      hnorm_(builder.vector(prefix_of(number) + "hnorm.weight", builder.config.hidden_size)),
      eh_proj_(builder.matrix(prefix_of(number) + "eh_proj.weight", builder.config.hidden_size,
                              2 * builder.config.hidden_size)),
      head_norm_(builder.vector(prefix_of(number) + "shared_head.norm.weight", builder.config.hidden_size)),
      block_(builder, number, hadamard) {}

FeedForwardOutput MtpModule::forward(const at::Tensor& h_NM, const at::Tensor& embedded_NM,
                                     const ForwardPass& pass) const {
  const at::Tensor both = at::cat({rms_norm(embedded_NM, enorm_, eps_), rms_norm(h_NM, hnorm_, eps_)}, 1);
  return block_.forward(at::linear(both, eh_proj_), pass);
}

at::Tensor MtpModule::head_norm(const at::Tensor& y_NM) const { return rms_norm(y_NM, head_norm_, eps_); }

}  // namespace dsa
