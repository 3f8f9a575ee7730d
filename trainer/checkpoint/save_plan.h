// Who writes what: of the copies of a box on several ranks one is written, and the ranks write about the same number of
// bytes. Pure arithmetic; every rank computes the same plan from the same list.
#pragma once

#include <string>
#include <vector>

#include "trainer/checkpoint/state_shard.h"

namespace dsa {

struct HeldBox {
  Role role = Role::PARAM;
  Dtype dtype = Dtype::F32;
  ShardSpec box;
  bool operator==(const HeldBox&) const = default;
};

/// A range of rows (dimension 0) of box number `held` of a rank. The whole box when it has no dimension.
struct PlannedPiece {
  size_t held = 0;
  Box box;
};

/// held[r]: what rank r has -> what rank r writes, in the order of its boxes. A box that only one rank has goes to it;
/// one with copies is cut into pieces of at most `piece_bytes` (a row at least), the largest given out first, each to
/// the holder with the least so far. Throws std::invalid_argument: ranks disagree about a shape or dtype, or the boxes
/// of a tensor overlap or leave a hole.
std::vector<std::vector<PlannedPiece>> plan_writers(const std::vector<std::vector<HeldBox>>& held,
                                                    uint64_t piece_bytes = uint64_t{16} << 20);

uint64_t bytes_of(Dtype dtype, const std::vector<int64_t>& extent);

/// One line a box, to be exchanged between ranks.
std::string encode(const std::vector<HeldBox>& boxes);
std::vector<HeldBox> decode(const std::string& text);

}  // namespace dsa
