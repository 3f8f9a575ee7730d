// Auxiliary-loss-free balancing (V3 report section 2.1.2): after each step, with the load over the whole global batch,
//   b_i += speed * sign(mean load - load_i)
#pragma once

#include <optional>

#include "parallel/mesh.h"
#include "trainer/model/forward_pass.h"
#include "trainer/model/parameter.h"

namespace dsa {

// Collective. speed 0 leaves the biases alone.
void update_router_bias(ParameterList& list, const ModelReport& report, double speed, Mesh& mesh);

// max / mean of the tokens per expert in the worst layer; nothing without MoE layers. Collective.
std::optional<double> expert_load_max_over_mean(const ModelReport& report, Mesh& mesh);

}  // namespace dsa
