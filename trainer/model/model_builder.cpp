#include "trainer/model/model_builder.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <stdexcept>

namespace dsa {
namespace {

at::Tensor leaf(at::IntArrayRef shape, at::ScalarType dtype, const Mesh& mesh) {
  return at::empty(shape, at::TensorOptions().dtype(dtype).device(mesh.device()));
}

std::string numbered(const std::string& pattern, int64_t number) {
  const size_t at = pattern.find('%');
  return pattern.substr(0, at) + std::to_string(number) + pattern.substr(at + 1);
}

}  // namespace

int64_t even_share(const std::string& what, int64_t n, int64_t parts, const char* axis) {
  if (n % parts == 0) return n / parts;
  std::string legal;
  for (int64_t d = 1; d <= std::min<int64_t>(n, 1024); d *= 2)
    if (n % d == 0) legal += (legal.empty() ? "" : ", ") + std::to_string(d);
  throw std::invalid_argument("cannot split " + what + " over " + axis + " = " + std::to_string(parts) + " (its size " +
                              std::to_string(n) + " is not a multiple) powers of two that work: " + legal);
}

at::ScalarType ModelBuilder::statistics_dtype() const { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor ModelBuilder::matrix(const std::string& name, int64_t out, int64_t in, ParameterGroup group) const {
  at::Tensor value = leaf({out, in}, dtype, mesh);
  list.parameters.push_back({value, {{name, {out, in}, {0, 0}, {out, in}, Split::NONE}}, group, true, false});
  return value;
}

at::Tensor ModelBuilder::tensor_split_matrix(const std::string& name, int64_t out, int64_t in, int dim) const {
  const int64_t parts = mesh.layout().degrees().tensor, index = mesh.coordinates().tensor;
  ShardSpec shard{name, {out, in}, {0, 0}, {out, in}, Split::TENSOR};
  shard.extent[dim] = even_share(name, shard.global_shape[dim], parts, "tensor");
  shard.offset[dim] = index * shard.extent[dim];
  at::Tensor value = leaf(shard.extent, dtype, mesh);
  list.parameters.push_back({value, {shard}, ParameterGroup::BACKBONE, true, false});
  return value;
}

at::Tensor ModelBuilder::expert_matrices(const std::string& name, int64_t out, int64_t in) const {
  const int64_t ranks = mesh.layout().degrees().expert;
  const int64_t local = even_share("the experts of " + name, config.n_routed_experts, ranks, "expert");
  const int64_t first = mesh.coordinates().expert * local;
  Parameter p{leaf({local, out, in}, dtype, mesh), {}, ParameterGroup::BACKBONE, true, true};
  for (int64_t e = 0; e < local; ++e)
    p.shards.push_back({numbered(name, first + e), {out, in}, {0, 0}, {out, in}, Split::EXPERT});
  at::Tensor value = p.value;
  list.parameters.push_back(std::move(p));
  return value;
}

at::Tensor ModelBuilder::vector(const std::string& name, int64_t n, ParameterGroup group) const {
  at::Tensor value = leaf({n}, statistics_dtype(), mesh);
  list.parameters.push_back({value, {{name, {n}, {0}, {n}, Split::NONE}}, group, false, false});
  return value;
}

at::Tensor ModelBuilder::buffer(const std::string& name, int64_t n) const {
  at::Tensor value = at::zeros({n}, at::TensorOptions().dtype(statistics_dtype()).device(mesh.device()));
  list.buffers.push_back({name, value});
  return value;
}

}  // namespace dsa
