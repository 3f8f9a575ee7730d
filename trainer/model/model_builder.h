// Declares parameters while the modules are constructed. Values are uninitialised until initialise() fills them.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "data/model_config.h"
#include "parallel/mesh.h"
#include "trainer/model/parameter.h"

namespace dsa {

// n / parts; throws std::invalid_argument naming the legal degrees when it does not divide. axis: "tensor", "expert".
int64_t even_share(const std::string& what, int64_t n, int64_t parts, const char* axis);

struct ModelBuilder {
  const ModelConfig& config;
  Mesh& mesh;
  at::ScalarType dtype;  // of matrices; norms and router bias are fp32 (fp64 when dtype is fp64)
  ParameterList& list;

  // A matrix [out, in] held whole by every rank.
  at::Tensor matrix(const std::string& name, int64_t out, int64_t in,
                    ParameterGroup group = ParameterGroup::BACKBONE) const;
  // A matrix [out, in] split over the tensor axis along `dim` (0 = output rows, 1 = input columns).
  // Throws std::invalid_argument when the tensor degree does not divide that size.
  at::Tensor tensor_split_matrix(const std::string& name, int64_t out, int64_t in, int dim) const;
  // This rank's experts of a layer, stacked [E_local, out, in]; `%` in the name stands for the expert's number.
  at::Tensor expert_matrices(const std::string& name, int64_t out, int64_t in) const;
  // A vector [n]: norm weights and biases; no weight decay.
  at::Tensor vector(const std::string& name, int64_t n, ParameterGroup group = ParameterGroup::BACKBONE) const;
  // The router's correction bias: changed by a rule, not by a gradient.
  at::Tensor buffer(const std::string& name, int64_t n) const;

  at::ScalarType statistics_dtype() const;
};

}  // namespace dsa
