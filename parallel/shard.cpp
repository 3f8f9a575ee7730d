#include "parallel/shard.h"

#include <algorithm>
#include <stdexcept>

namespace dsa {

namespace {

std::string text(const std::vector<int64_t>& v) {
  std::string s = "[";
  for (size_t i = 0; i < v.size(); ++i) s += (i ? ", " : "") + std::to_string(v[i]);
  return s + "]";
}

std::string text(const Box& box) { return "offset " + text(box.offset) + " extent " + text(box.extent); }

}  // namespace

Rows rows_of(int64_t n, int parts, int index) {
  const int64_t base = n / parts, longer = n % parts;
  return {index * base + std::min<int64_t>(index, longer), base + (index < longer ? 1 : 0)};
}

ShardSpec whole(std::string name, std::vector<int64_t> shape) {
  std::vector<int64_t> offset(shape.size(), 0);
  return {std::move(name), shape, std::move(offset), shape, Split::NONE};
}

ShardSpec cut(std::string name, std::vector<int64_t> shape, int64_t dim, int parts, int index, Split split) {
  if (dim < 0 || dim >= static_cast<int64_t>(shape.size()) || parts < 1 || index < 0 || index >= parts)
    throw std::invalid_argument("cannot cut " + name + " (dim " + std::to_string(dim) + ", part " +
                                std::to_string(index) + " of " + std::to_string(parts) + ", shape " + text(shape) +
                                ") give a dim of the shape and a part below their number");
  ShardSpec spec = whole(std::move(name), std::move(shape));
  const Rows rows = rows_of(spec.global_shape[dim], parts, index);
  spec.offset[dim] = rows.offset;
  spec.extent[dim] = rows.extent;
  spec.split = split;
  return spec;
}

int64_t numel(const std::vector<int64_t>& extent) {
  int64_t n = 1;
  for (int64_t e : extent) n *= e;
  return n;
}

bool is_whole(const ShardSpec& spec) { return spec.extent == spec.global_shape; }

std::optional<Box> overlap(const Box& a, const Box& b) {
  if (a.offset.size() != b.offset.size())
    throw std::invalid_argument("cannot intersect boxes (" + text(a) + " and " + text(b) +
                                ") they have different numbers of dimensions");
  Box common = a;
  for (size_t d = 0; d < a.offset.size(); ++d) {
    const int64_t begin = std::max(a.offset[d], b.offset[d]);
    const int64_t end = std::min(a.offset[d] + a.extent[d], b.offset[d] + b.extent[d]);
    if (end <= begin) return std::nullopt;
    common.offset[d] = begin;
    common.extent[d] = end - begin;
  }
  return common;
}

std::string why_not_covered(const std::vector<Box>& boxes, const std::vector<int64_t>& global_shape) {
  std::vector<const Box*> sorted;
  int64_t covered = 0;
  for (const Box& box : boxes) {
    if (box.offset.size() != global_shape.size() || box.extent.size() != global_shape.size())
      return text(box) + " has another number of dimensions than " + text(global_shape);
    if (numel(box.extent) == 0) continue;
    for (size_t d = 0; d < global_shape.size(); ++d)
      if (box.offset[d] < 0 || box.extent[d] < 0 || box.offset[d] + box.extent[d] > global_shape[d])
        return text(box) + " leaves the shape " + text(global_shape);
    sorted.push_back(&box);
    covered += numel(box.extent);
  }
  // Boxes sorted by their first row: only those that begin before this one ends can meet it.
  const bool scalar = global_shape.empty();
  std::sort(sorted.begin(), sorted.end(), [](const Box* a, const Box* b) { return a->offset < b->offset; });
  for (size_t i = 0; i < sorted.size(); ++i)
    for (size_t j = i + 1; j < sorted.size(); ++j) {
      if (!scalar && sorted[j]->offset[0] >= sorted[i]->offset[0] + sorted[i]->extent[0]) break;
      if (overlap(*sorted[i], *sorted[j])) return text(*sorted[i]) + " and " + text(*sorted[j]) + " overlap";
    }
  // Disjoint boxes inside the shape cover it when their volumes add up.
  if (covered != numel(global_shape))
    return "the boxes hold " + std::to_string(covered) + " of " + std::to_string(numel(global_shape)) +
           " elements of " + text(global_shape);
  return "";
}

Axis gradient_axis(Split split) {
  switch (split) {
    case Split::TENSOR: return Axis::REPLICA;
    case Split::EXPERT: return Axis::EXPERT_REPLICA;
    case Split::NONE: break;
  }
  return Axis::WORLD;
}

}  // namespace dsa
