#include "trainer/router_bias.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/stack.h>
#include <c10/core/GradMode.h>

namespace dsa {
namespace {

// [MoE layers, experts] tokens over all ranks, fp64, on the host; undefined without MoE layers.
at::Tensor global_load(const ModelReport& report, Mesh& mesh) {
  std::vector<at::Tensor> rows;
  for (const LayerReport& l : report.layers)
    if (l.expert_rows_E.defined()) rows.push_back(l.expert_rows_E);
  if (rows.empty()) return {};
  return mesh.along(Axis::WORLD).all_reduce(at::stack(rows).cpu()).to(at::kDouble);
}

}  // namespace

void update_router_bias(ParameterList& list, const ModelReport& report, double speed, Mesh& mesh) {
  if (speed == 0) return;
  const c10::NoGradGuard no_grad;
  const at::Tensor load_LE = global_load(report, mesh);
  if (!load_LE.defined()) return;
  // Buffers were declared layer by layer, as the report's MoE layers stand.
  const at::Tensor sign_LE = (load_LE.mean(1, /*keepdim=*/true) - load_LE).sign().to(list.buffers[0].value.options());
  for (size_t l = 0; l < list.buffers.size(); ++l) list.buffers[l].value.add_(sign_LE[static_cast<int64_t>(l)], speed);
}

std::optional<double> expert_load_max_over_mean(const ModelReport& report, Mesh& mesh) {
  const at::Tensor load_LE = global_load(report, mesh);
  if (!load_LE.defined()) return std::nullopt;
  return (load_LE.amax(1) / load_LE.mean(1)).max().item<double>();
}

}  // namespace dsa
