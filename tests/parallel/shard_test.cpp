#include "parallel/shard.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <stdexcept>

namespace dsa {
namespace {

using Point = std::vector<int64_t>;

std::set<Point> points(const Box& box) {
  std::set<Point> all;
  if (numel(box.extent) == 0) return all;
  Point p = box.offset;
  while (true) {
    all.insert(p);
    int64_t d = static_cast<int64_t>(p.size()) - 1;
    while (d >= 0 && ++p[d] == box.offset[d] + box.extent[d]) p[d] = box.offset[d], --d;
    if (d < 0) return all;
  }
}

TEST(Shard, RowsAreBalancedContiguousAndComplete) {
  for (int64_t n : {0, 1, 2, 5, 7, 16, 1000})
    for (int parts = 1; parts <= 9; ++parts) {
      int64_t next = 0;
      for (int i = 0; i < parts; ++i) {
        const Rows rows = rows_of(n, parts, i);
        EXPECT_EQ(rows.offset, next);
        EXPECT_EQ(rows.extent, n / parts + (i < n % parts));
        next = rows.end();
      }
      EXPECT_EQ(next, n);
    }
}

TEST(Shard, CutsCoverTheTensor) {
  const std::vector<int64_t> shape = {6, 10, 3};
  for (int64_t dim = 0; dim < 3; ++dim)
    for (int parts = 1; parts <= 7; ++parts) {
      std::vector<Box> boxes;
      for (int i = 0; i < parts; ++i) {
        const ShardSpec spec = cut("w", shape, dim, parts, i, Split::TENSOR);
        EXPECT_EQ(is_whole(spec), parts == 1);
        EXPECT_EQ(spec.split, Split::TENSOR);
        boxes.push_back(spec.box());
      }
      EXPECT_EQ(why_not_covered(boxes, shape), "");
    }
  EXPECT_TRUE(is_whole(whole("w", shape)));
  EXPECT_EQ(numel(whole("w", shape)), 180);
  EXPECT_EQ(numel(whole("scalar", {})), 1);
  EXPECT_THROW(cut("w", shape, 3, 2, 0, Split::TENSOR), std::invalid_argument);
  EXPECT_THROW(cut("w", shape, 0, 2, 2, Split::TENSOR), std::invalid_argument);
}

TEST(Shard, OverlapIsTheSetIntersection) {
  std::mt19937 random(7);
  int met = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const size_t dims = 1 + random() % 3;
    Box a, b;
    for (size_t d = 0; d < dims; ++d) {
      a.offset.push_back(random() % 6), a.extent.push_back(random() % 5);
      b.offset.push_back(random() % 6), b.extent.push_back(random() % 5);
    }
    std::set<Point> expected;
    const std::set<Point> in_b = points(b);
    for (const Point& p : points(a))
      if (in_b.count(p)) expected.insert(p);
    const std::optional<Box> common = overlap(a, b);
    EXPECT_EQ(common.has_value(), !expected.empty());
    if (common) {
      EXPECT_EQ(points(*common), expected);
      ++met;
    }
    EXPECT_EQ(overlap(b, a), common);
  }
  EXPECT_GT(met, 300);
  EXPECT_THROW(overlap({{0}, {1}}, {{0, 0}, {1, 1}}), std::invalid_argument);
}

/// Cuts a box at random places until it is in `pieces` boxes or cannot be cut.
std::vector<Box> random_partition(std::vector<int64_t> shape, int pieces, std::mt19937& random) {
  std::vector<Box> boxes = {{std::vector<int64_t>(shape.size(), 0), shape}};
  for (int i = 1; i < pieces; ++i) {
    Box& victim = boxes[random() % boxes.size()];
    const size_t d = random() % shape.size();
    if (victim.extent[d] < 2) continue;
    const int64_t at = 1 + random() % (victim.extent[d] - 1);
    Box right = victim;
    right.offset[d] += at;
    right.extent[d] -= at;
    victim.extent[d] = at;
    boxes.push_back(right);
  }
  std::shuffle(boxes.begin(), boxes.end(), random);
  return boxes;
}

TEST(Shard, CoverageIsProvenOrTheReasonGiven) {
  std::mt19937 random(11);
  for (int trial = 0; trial < 500; ++trial) {
    const std::vector<int64_t> shape = {static_cast<int64_t>(2 + random() % 8), static_cast<int64_t>(2 + random() % 8)};
    std::vector<Box> boxes = random_partition(shape, 2 + random() % 10, random);
    EXPECT_EQ(why_not_covered(boxes, shape), "");

    std::vector<Box> missing = boxes;
    missing.pop_back();
    EXPECT_FALSE(covers_exactly(missing, shape));

    std::vector<Box> twice = boxes;
    twice.push_back(boxes[random() % boxes.size()]);
    EXPECT_NE(why_not_covered(twice, shape).find("overlap"), std::string::npos);

    // One box too many and one too few: the volumes can add up, the check must still see it.
    std::vector<Box> exchanged = boxes;
    exchanged.back() = exchanged.front();
    if (exchanged.size() > 1) {
      EXPECT_FALSE(covers_exactly(exchanged, shape));
    }

    std::vector<Box> outside = boxes;
    outside[0].offset[0] += shape[0];
    EXPECT_NE(why_not_covered(outside, shape).find("leaves"), std::string::npos);
  }
  EXPECT_TRUE(covers_exactly({{{}, {}}}, {}));
  EXPECT_FALSE(covers_exactly({{{}, {}}, {{}, {}}}, {}));
  EXPECT_FALSE(covers_exactly({}, {}));
  EXPECT_TRUE(covers_exactly({}, {0, 4}));
  EXPECT_FALSE(covers_exactly({{{0}, {4}}}, {4, 1}));
}

TEST(Shard, GradientsAreSummedWhereTheSameShardLives) {
  // From the definition: two ranks share a shard of a tensor-split parameter when their tensor coordinate is equal,
  // of an expert-split one when their expert coordinate is, and of a replicated one always.
  const ParallelLayout layout({.data = 2, .context = 2, .tensor = 2, .expert = 4});
  for (int a = 0; a < layout.world(); ++a)
    for (int b = 0; b < layout.world(); ++b) {
      auto together = [&](Split split) {
        const std::vector<int> group = layout.group(gradient_axis(split), a);
        return std::find(group.begin(), group.end(), b) != group.end();
      };
      EXPECT_TRUE(together(Split::NONE));
      EXPECT_EQ(together(Split::TENSOR), layout.of(a).tensor == layout.of(b).tensor);
      EXPECT_EQ(together(Split::EXPERT), layout.of(a).expert == layout.of(b).expert);
    }
}

}  // namespace
}  // namespace dsa
