#include "parallel/sequence_split.h"

#include <gtest/gtest.h>

#include <numeric>
#include <stdexcept>

namespace dsa {
namespace {

TEST(SequenceSplit, ZigzagByHand) {
  const SequenceSplit split(/*batch=*/2, /*length=*/8, /*context=*/2, /*tensor=*/2);
  EXPECT_EQ(split.natural_rows(0, 0), (std::vector<int64_t>{0, 7, 8, 15}));
  EXPECT_EQ(split.natural_rows(0, 1), (std::vector<int64_t>{1, 6, 9, 14}));
  EXPECT_EQ(split.natural_rows(1), (std::vector<int64_t>{2, 5, 10, 13, 3, 4, 11, 12}));
  EXPECT_EQ(split.own_range(1), (Rows{4, 4}));
}

TEST(SequenceSplit, GatheredAndNaturalOrderAreInverse) {
  for (int64_t batch : {1, 2, 3})
    for (int64_t length : {32, 96})
      for (int context : {1, 2, 4})
        for (int tensor : {1, 2, 4}) {
          const SequenceSplit split(batch, length, context, tensor);
          // The all-gather over SEQUENCE, by definition: own rows of (context, tensor), context major.
          std::vector<int64_t> gathered;
          for (int c = 0; c < context; ++c)
            for (int t = 0; t < tensor; ++t) {
              const std::vector<int64_t> own = split.natural_rows(c, t);
              EXPECT_EQ(static_cast<int64_t>(own.size()), split.own_rows());
              gathered.insert(gathered.end(), own.begin(), own.end());
            }
          EXPECT_EQ(split.gathered_from_natural(), gathered);
          const std::vector<int64_t> order = split.natural_from_gathered();
          ASSERT_EQ(static_cast<int64_t>(order.size()), batch * length);
          for (int64_t row = 0; row < batch * length; ++row) EXPECT_EQ(gathered[order[row]], row);
          std::vector<int64_t> identity(batch * length);
          std::iota(identity.begin(), identity.end(), 0);
          EXPECT_EQ(order == identity, split.is_identity());
        }
}

TEST(SequenceSplit, CausalWorkIsEqualForEveryRank) {
  for (int context : {1, 2, 4})
    for (int tensor : {1, 2, 4, 8}) {
      const SequenceSplit split(2, 64, context, tensor);
      for (int c = 0; c < context; ++c)
        for (int t = 0; t < tensor; ++t) {
          int64_t keys = 0;
          for (int64_t row : split.natural_rows(c, t)) keys += row % 64 + 1;
          EXPECT_EQ(keys, 2 * 64 * 65 / 2 / (context * tensor));
        }
    }
}

TEST(SequenceSplit, OneRankTakesAnyLength) {
  const SequenceSplit split(3, 7, 1, 1);
  EXPECT_EQ(split.own_rows(), 21);
  EXPECT_TRUE(split.is_identity());
}

TEST(SequenceSplit, IllegalSplitsNameTheLegalOnes) {
  try {
    SequenceSplit(1, 10, 2, 1);
    FAIL();
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find("use a length of 8 or 12"), std::string::npos) << e.what();
  }
  try {
    SequenceSplit(1, 6, 1, 4);
    FAIL();
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find("use a length of 8,"), std::string::npos) << e.what();
  }
  EXPECT_THROW(SequenceSplit(0, 8, 1, 1), std::invalid_argument);
}

}  // namespace
}  // namespace dsa
