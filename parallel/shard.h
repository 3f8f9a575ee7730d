// Which part of a tensor a rank holds: a box [offset, offset + extent) of its global shape. ShardSpec is the single
// source of truth for initialisation, gradient groups, norms, checkpoints and the reading of HF folders.
// Pure: no MPI, no tensors.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "parallel/layout.h"

namespace dsa {

/// Which axis cuts a parameter. What is not cut is replicated.
enum class Split { NONE, TENSOR, EXPERT };

struct Box {
  std::vector<int64_t> offset, extent;
  bool operator==(const Box&) const = default;
};

struct ShardSpec {
  std::string name;
  std::vector<int64_t> global_shape, offset, extent;
  Split split = Split::NONE;
  Box box() const { return {offset, extent}; }
  bool operator==(const ShardSpec&) const = default;
};

/// A contiguous range of rows.
struct Rows {
  int64_t offset = 0, extent = 0;
  int64_t end() const { return offset + extent; }
  bool operator==(const Rows&) const = default;
};

/// Part `index` of `n` rows cut into `parts` contiguous ranges; the first n % parts get one row more.
Rows rows_of(int64_t n, int parts, int index);

/// The whole tensor, replicated.
ShardSpec whole(std::string name, std::vector<int64_t> shape);
/// Part `index` of `parts` along `dim` (rows_of). Throws std::invalid_argument for a dim that is not there.
ShardSpec cut(std::string name, std::vector<int64_t> shape, int64_t dim, int parts, int index, Split split);

int64_t numel(const std::vector<int64_t>& extent);
inline int64_t numel(const ShardSpec& spec) { return numel(spec.extent); }
bool is_whole(const ShardSpec& spec);

/// The common box, or nothing when there is no common element. Both have the same number of dimensions.
std::optional<Box> overlap(const Box& a, const Box& b);

/// Empty when the boxes cover `global_shape` completely and no element twice; otherwise the reason, for a message.
/// Boxes without elements are ignored.
std::string why_not_covered(const std::vector<Box>& boxes, const std::vector<int64_t>& global_shape);
inline bool covers_exactly(const std::vector<Box>& boxes, const std::vector<int64_t>& global_shape) {
  return why_not_covered(boxes, global_shape).empty();
}

/// The ranks among which a parameter's gradient is summed: those that hold the same shard.
/// NONE -> WORLD, TENSOR -> REPLICA, EXPERT -> EXPERT_REPLICA.
Axis gradient_axis(Split split);

}  // namespace dsa
