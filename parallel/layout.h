// Which rank does what, as pure arithmetic (no MPI, no tensors: one process can reason about any world).
//
//   rank          = (data * context_degree + context) * tensor_degree + tensor
//   expert        = rank % expert_degree            consecutive ranks form an expert group
//   world         = data_degree * context_degree * tensor_degree; expert_degree divides it
#pragma once

#include <string>
#include <vector>

namespace dsa {

/// How many ways each kind of work is split. All at least 1.
struct Degrees {
  int data = 1;
  int context = 1;
  int tensor = 1;
  int expert = 1;
};

/// Where one rank stands. data, context and tensor are independent; expert overlays them.
struct Coordinates {
  int data = 0;
  int context = 0;
  int tensor = 0;
  int expert = 0;
};

enum class Axis {
  TENSOR,          ///< same (data, context)
  CONTEXT,         ///< same (data, tensor)
  SEQUENCE,        ///< same data: the context x tensor ranks that share one sequence, context major
  DATA,            ///< same (context, tensor)
  REPLICA,         ///< same tensor: the data x context ranks that hold the same tensor shard, data major
  EXPERT,          ///< same rank / expert_degree: together they hold every expert once
  EXPERT_REPLICA,  ///< same rank % expert_degree: they hold the same experts
  WORLD,
};
inline constexpr int kAxisCount = 8;

/// "tensor", "context", ... for messages.
const char* name_of(Axis axis);

class ParallelLayout {
 public:
  /// Throws std::invalid_argument when a degree is below 1 or `expert` does not divide the world; the message
  /// names the legal values.
  explicit ParallelLayout(Degrees degrees);

  const Degrees& degrees() const { return degrees_; }
  int world() const { return degrees_.data * degrees_.context * degrees_.tensor; }
  int degree(Axis axis) const;

  /// Throws std::out_of_range unless 0 <= rank < world().
  Coordinates of(int rank) const;

  /// The world ranks of the group that `rank` belongs to along `axis`, ascending. `rank` is one of them; its
  /// index in the list is its rank in the group's communicator.
  std::vector<int> group(Axis axis, int rank) const;

 private:
  Degrees degrees_;
};

}  // namespace dsa
