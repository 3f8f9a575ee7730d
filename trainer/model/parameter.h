// The parameters of a model as this rank holds them. A ShardSpec says which box of which logical tensor (HF name)
// a parameter is: initialisation, gradient groups, checkpoints and import all follow from it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "parallel/mesh.h"
#include "parallel/shard.h"

namespace dsa {

// Backbone and indexer are clipped apart and have learning rates of their own (spec: the separation must be exact).
enum class ParameterGroup { BACKBONE, INDEXER };

struct Parameter {
  at::Tensor value;               // a leaf; experts of one layer are stacked: [E_local, ...]
  std::vector<ShardSpec> shards;  // one, or one an expert: shards[e] describes value[e]
  ParameterGroup group = ParameterGroup::BACKBONE;
  bool decay = true;     // false for norms and biases
  bool stacked = false;  // experts

  // The part of `whole` (the value, or its gradient) that shards[i] describes: a view.
  at::Tensor piece(const at::Tensor& whole, size_t i) const {
    return stacked ? whole.select(0, static_cast<int64_t>(i)) : whole;
  }
};

// State that is trained by a rule, not by a gradient: the router's correction bias. Replicated on every rank.
struct Buffer {
  std::string name;
  at::Tensor value;
};

struct ParameterList {
  std::vector<Parameter> parameters;
  std::vector<Buffer> buffers;

  void set_trainable(ParameterGroup group, bool trainable);
  int64_t local_elements() const;
};

// The logical tensors of which `local` (of p.value's shape: the value itself, or a gradient) is this rank's part,
// put together from all ranks: HF name and whole tensor. Collective; every rank gets all of them.
std::vector<std::pair<std::string, at::Tensor>> gather_whole(const Parameter& p, const at::Tensor& local, Mesh& mesh);

}  // namespace dsa
