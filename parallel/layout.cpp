#include "parallel/layout.h"

#include <array>
#include <stdexcept>

namespace dsa {

const char* name_of(Axis axis) {
  static constexpr std::array<const char*, kAxisCount> kNames = {"tensor",  "context", "sequence",       "data",
                                                                 "replica", "expert",  "expert replica", "world"};
  return kNames.at(static_cast<size_t>(axis));
}

ParallelLayout::ParallelLayout(Degrees degrees) : degrees_(degrees) {
  auto at_least_one = [](const char* name, int degree) {
    if (degree < 1)
      throw std::invalid_argument("illegal mesh (" + std::string(name) + " = " + std::to_string(degree) +
                                  ") every degree is 1 or more");
  };
  at_least_one("data", degrees.data);
  at_least_one("context", degrees.context);
  at_least_one("tensor", degrees.tensor);
  at_least_one("expert", degrees.expert);
  if (world() % degrees.expert != 0) {
    std::string legal;
    for (int d = 1; d <= world(); ++d)
      if (world() % d == 0) legal += (legal.empty() ? "" : ", ") + std::to_string(d);
    throw std::invalid_argument("illegal mesh (expert = " + std::to_string(degrees.expert) +
                                " does not divide data x context x tensor = " + std::to_string(world()) +
                                ") expert may be " + legal);
  }
}

int ParallelLayout::degree(Axis axis) const { return static_cast<int>(group(axis, 0).size()); }

Coordinates ParallelLayout::of(int rank) const {
  if (rank < 0 || rank >= world())
    throw std::out_of_range("no such rank (" + std::to_string(rank) + " of a world of " + std::to_string(world()) +
                            ") ranks count from 0");
  const int replica = rank / degrees_.tensor;
  return {replica / degrees_.context, replica % degrees_.context, rank % degrees_.tensor, rank % degrees_.expert};
}

std::vector<int> ParallelLayout::group(Axis axis, int rank) const {
  const Coordinates mine = of(rank);
  std::vector<int> members;
  for (int other = 0; other < world(); ++other) {
    const Coordinates c = of(other);
    bool same = false;
    switch (axis) {
      case Axis::TENSOR: same = c.data == mine.data && c.context == mine.context; break;
      case Axis::CONTEXT: same = c.data == mine.data && c.tensor == mine.tensor; break;
      case Axis::SEQUENCE: same = c.data == mine.data; break;
      case Axis::DATA: same = c.context == mine.context && c.tensor == mine.tensor; break;
      case Axis::REPLICA: same = c.tensor == mine.tensor; break;
      case Axis::EXPERT: same = other / degrees_.expert == rank / degrees_.expert; break;
      case Axis::EXPERT_REPLICA: same = c.expert == mine.expert; break;
      case Axis::WORLD: same = true; break;
    }
    if (same) members.push_back(other);
  }
  return members;
}

}  // namespace dsa
