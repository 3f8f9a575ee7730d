#include "parallel/layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <stdexcept>

namespace dsa {
namespace {

std::vector<Degrees> many_worlds() {
  std::vector<Degrees> all;
  for (int d = 1; d <= 4; ++d)
    for (int c = 1; c <= 4; ++c)
      for (int t : {1, 2, 3, 8})
        for (int e = 1; e <= d * c * t; ++e)
          if (d * c * t % e == 0) all.push_back({d, c, t, e});
  return all;
}

TEST(Layout, RankFollowsItsCoordinates) {
  for (const Degrees& g : many_worlds()) {
    const ParallelLayout layout(g);
    std::set<std::vector<int>> seen;
    for (int rank = 0; rank < layout.world(); ++rank) {
      const Coordinates c = layout.of(rank);
      EXPECT_EQ(rank, (c.data * g.context + c.context) * g.tensor + c.tensor);
      EXPECT_EQ(c.expert, rank % g.expert);
      EXPECT_TRUE(seen.insert({c.data, c.context, c.tensor}).second);
    }
  }
}

TEST(Layout, GroupsOfAnAxisPartitionTheWorld) {
  for (const Degrees& g : many_worlds()) {
    const ParallelLayout layout(g);
    const int expected[kAxisCount] = {g.tensor, g.context,         g.context * g.tensor, g.data, g.data * g.context,
                                      g.expert, layout.world() / g.expert, layout.world()};
    for (int a = 0; a < kAxisCount; ++a) {
      const Axis axis = static_cast<Axis>(a);
      EXPECT_EQ(layout.degree(axis), expected[a]);
      for (int rank = 0; rank < layout.world(); ++rank) {
        const std::vector<int> group = layout.group(axis, rank);
        ASSERT_EQ(static_cast<int>(group.size()), expected[a]) << name_of(axis);
        EXPECT_TRUE(std::is_sorted(group.begin(), group.end()));
        EXPECT_TRUE(std::find(group.begin(), group.end(), rank) != group.end());
        for (int other : group) EXPECT_EQ(layout.group(axis, other), group);
      }
    }
  }
}

TEST(Layout, AxesMeanWhatTheySay) {
  const ParallelLayout layout({.data = 2, .context = 2, .tensor = 2, .expert = 4});
  EXPECT_EQ(layout.group(Axis::TENSOR, 5), (std::vector<int>{4, 5}));
  EXPECT_EQ(layout.group(Axis::CONTEXT, 5), (std::vector<int>{5, 7}));
  EXPECT_EQ(layout.group(Axis::SEQUENCE, 5), (std::vector<int>{4, 5, 6, 7}));
  EXPECT_EQ(layout.group(Axis::DATA, 5), (std::vector<int>{1, 5}));
  EXPECT_EQ(layout.group(Axis::REPLICA, 5), (std::vector<int>{1, 3, 5, 7}));
  EXPECT_EQ(layout.group(Axis::EXPERT, 5), (std::vector<int>{4, 5, 6, 7}));
  EXPECT_EQ(layout.group(Axis::EXPERT_REPLICA, 5), (std::vector<int>{1, 5}));
}

TEST(Layout, IllegalDegreesNameTheLegalOnes) {
  EXPECT_THROW(ParallelLayout({.data = 0}), std::invalid_argument);
  EXPECT_THROW(ParallelLayout({.tensor = -2}), std::invalid_argument);
  try {
    ParallelLayout({.data = 3, .tensor = 2, .expert = 4});
    FAIL() << "expert 4 in a world of 6 was accepted";
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find("expert may be 1, 2, 3, 6"), std::string::npos) << e.what();
  }
  EXPECT_THROW(ParallelLayout({.data = 2}).of(2), std::out_of_range);
}

}  // namespace
}  // namespace dsa
