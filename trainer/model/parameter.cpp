#include "trainer/model/parameter.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/unbind.h>

namespace dsa {

void ParameterList::set_trainable(ParameterGroup group, bool trainable) {
  for (Parameter& p : parameters)
    if (p.group == group) p.value.set_requires_grad(trainable);
}

int64_t ParameterList::local_elements() const {
  int64_t n = 0;
  for (const Parameter& p : parameters) n += p.value.numel();
  return n;
}

std::vector<std::pair<std::string, at::Tensor>> gather_whole(const Parameter& p, const at::Tensor& local, Mesh& mesh) {
  const at::Tensor mine = local.detach().unsqueeze(0);
  if (p.stacked) {
    const at::Tensor all = mesh.along(Axis::EXPERT).all_gather(mine).flatten(0, 1);
    const std::string& first = p.shards[0].name;
    const std::string mark = ".experts.";
    const size_t begin = first.find(mark) + mark.size(), end = first.find('.', begin);
    std::vector<std::pair<std::string, at::Tensor>> experts;
    for (int64_t e = 0; e < all.size(0); ++e)
      experts.emplace_back(first.substr(0, begin) + std::to_string(e) + first.substr(end), all.select(0, e));
    return experts;
  }
  const ShardSpec& spec = p.shards[0];
  if (is_whole(spec)) return {{spec.name, mine.squeeze(0)}};
  const int64_t dim = spec.extent[0] != spec.global_shape[0] ? 0 : 1;
  return {{spec.name, at::cat(mesh.along(Axis::TENSOR).all_gather(mine).unbind(0), dim)}};
}

}  // namespace dsa
