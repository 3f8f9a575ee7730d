// Who writes what: each element once, by a rank that has it, about the same number of bytes a rank.
#include "trainer/checkpoint/save_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "synthetic_state.h"

namespace dsa {
namespace {

HeldBox held(const std::string& name, std::vector<int64_t> shape, Box box) {
  return {Role::PARAM, Dtype::F32, {name, std::move(shape), box.offset, box.extent}};
}

TEST(SavePlan, EveryElementIsWrittenOnceByAHolder) {
  std::mt19937 rng(5);
  for (int trial = 0; trial < 50; ++trial) {
    const int ranks = 1 + static_cast<int>(rng() % 6);
    std::vector<std::vector<HeldBox>> all(ranks);
    const std::vector<int64_t> shape{37, 11};
    for (const Box& box : test::random_boxes(shape, 7, false, rng)) {
      const int copies = 1 + static_cast<int>(rng() % ranks), first = static_cast<int>(rng() % ranks);
      for (int c = 0; c < copies; ++c) all[(first + c) % ranks].push_back(held("w", shape, box));
    }
    const auto plan = plan_writers(all, 200);
    std::vector<Box> written;
    for (int rank = 0; rank < ranks; ++rank)
      for (const PlannedPiece& piece : plan[rank]) {
        const Box mine = all[rank].at(piece.held).box.box();
        EXPECT_EQ(overlap(piece.box, mine), piece.box);                                  // it has it
        EXPECT_TRUE(std::equal(mine.extent.begin() + 1, mine.extent.end(), piece.box.extent.begin() + 1));  // whole rows
        written.push_back(piece.box);
      }
    EXPECT_EQ(why_not_covered(written, shape), "");
  }
}

TEST(SavePlan, ReplicatedBytesAreSpreadEvenly) {
  // 4 ranks hold the same embedding; rank 0 also holds something of its own, an eighth of it.
  std::vector<std::vector<HeldBox>> all(4);
  const std::vector<int64_t> shape{8192, 256};
  for (auto& rank : all) rank.push_back(held("embedding", shape, {{0, 0}, shape}));
  all[0].push_back(held("own", {1024, 256}, {{0, 0}, {1024, 256}}));
  const auto plan = plan_writers(all, 1 << 16);
  const uint64_t mean = (8192 + 1024) * 256 * 4 / 4;
  for (int rank = 0; rank < 4; ++rank) {
    uint64_t bytes = 0;
    for (const PlannedPiece& piece : plan[rank]) bytes += bytes_of(Dtype::F32, piece.box.extent);
    EXPECT_NEAR(static_cast<double>(bytes), static_cast<double>(mean), 0.05 * mean) << rank;
  }
}

TEST(SavePlan, RefusesHolesOverlapsAndDisagreement) {
  const auto message = [](const std::vector<std::vector<HeldBox>>& all) -> std::string {
    try {
      plan_writers(all);
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "accepted";
  };
  const HeldBox top = held("w", {4, 2}, {{0, 0}, {2, 2}}), bottom = held("w", {4, 2}, {{2, 0}, {2, 2}});
  EXPECT_EQ(message({{top}, {bottom}}), "accepted");
  EXPECT_NE(message({{top}, {top}}).find("4 of 8 elements"), std::string::npos);
  EXPECT_NE(message({{top}, {held("w", {4, 2}, {{1, 0}, {3, 2}})}}).find("overlap"), std::string::npos);
  EXPECT_NE(message({{top}, {held("w", {4, 3}, {{2, 0}, {2, 3}})}}).find("another shape or dtype"), std::string::npos);
  EXPECT_NE(message({{top, top, bottom}}).find("twice"), std::string::npos);
}

TEST(SavePlan, BoxesSurviveTheExchange) {
  const std::vector<HeldBox> boxes{held("a.b", {4, 2}, {{2, 0}, {2, 2}}), {Role::MOMENT2, Dtype::BF16, {"scalar", {}, {}, {}}},
                                   held("none", {0, 3}, {{0, 0}, {0, 3}})};
  EXPECT_EQ(decode(encode(boxes)), boxes);
}

}  // namespace
}  // namespace dsa
