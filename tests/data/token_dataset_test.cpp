#include "data/token_dataset.h"

#include <gtest/gtest.h>

#include <set>

#include "tests/data/token_file.h"

namespace dsa {
namespace {

using namespace testing_support;

TEST(Permute, IsABijectionForAnySize) {
  for (uint64_t n : {1u, 2u, 3u, 5u, 16u, 17u, 100u, 1000u, 4096u, 4097u})
    for (uint64_t epoch : {0u, 1u, 7u}) {
      std::set<uint64_t> seen;
      for (uint64_t i = 0; i < n; ++i) {
        const uint64_t p = permute(i, n, 42, epoch);
        EXPECT_LT(p, n);
        seen.insert(p);
      }
      EXPECT_EQ(seen.size(), n);
    }
  EXPECT_LT(permute(123456789012, 1ull << 62, 1, 0), 1ull << 62);
  EXPECT_THROW(permute(5, 5, 0, 0), std::out_of_range);
}

TEST(Permute, ShufflesAndDependsOnItsKey) {
  const uint64_t n = 10000;
  double distance = 0;
  int same_seed = 0, same_epoch = 0, ascending = 0;
  for (uint64_t i = 0; i < n; ++i) {
    const uint64_t p = permute(i, n, 1, 0);
    distance += std::abs(static_cast<double>(p) - static_cast<double>(i));
    same_seed += p == permute(i, n, 2, 0);
    same_epoch += p == permute(i, n, 1, 1);
    if (i > 0) ascending += p > permute(i - 1, n, 1, 0);
  }
  EXPECT_NEAR(distance / static_cast<double>(n * n), 1.0 / 3, 0.02);  // of two uniform numbers
  EXPECT_NEAR(ascending, 5000, 250);
  EXPECT_LT(same_seed, 10);
  EXPECT_LT(same_epoch, 10);
}

class Dataset : public ::testing::Test {
 protected:
  // Two files of 100 and 61 tokens; token i of the stream is i; documents of 30 and 20 tokens.
  Dataset() {
    int64_t next = 0;
    for (const auto& [name, size, step] : {std::tuple<std::string, int64_t, int64_t>{"a.h5", 100, 30}, {"b.h5", 61, 20}}) {
      std::vector<uint32_t> ids;
      std::vector<int64_t> offsets;
      for (int64_t i = 0; i < size; ++i) ids.push_back(static_cast<uint32_t>(next++));
      for (int64_t i = 0; i < size; i += step) offsets.push_back(i), borders_.insert(next - size + i);
      offsets.push_back(size);
      write_token_file(dir_ / name, ids, offsets);
      sources_.push_back(open_token_source(dir_ / name, 258, true));
    }
  }
  TokenDataset make(bool mask, int64_t hold_out = 0, uint64_t seed = 5) {
    return TokenDataset(sources_, 16, seed, mask, TokenDataset::HoldOut{hold_out});
  }
  TempFolder dir_;
  std::vector<std::shared_ptr<TokenSource>> sources_;
  std::set<int64_t> borders_;
};

TEST_F(Dataset, SamplesCoverTheStreamOnceAnEpoch) {
  const auto data = make(true);
  ASSERT_EQ(data.samples(), 10);  // (161 - 1) / 16
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    std::set<int64_t> seen;
    for (int64_t i = 0; i < 10; ++i) {
      const Sample sample = data.sample(epoch * 10 + i);
      const int64_t begin = data.stream_index(epoch * 10 + i) * 16;
      seen.insert(begin);
      ASSERT_EQ(sample.tokens.size(), 17u);
      ASSERT_EQ(sample.document_start.size(), 16u);
      int32_t start = 0;
      for (int64_t t = 0; t < 17; ++t) {
        EXPECT_EQ(sample.tokens[static_cast<size_t>(t)], begin + t);
        if (borders_.count(begin + t)) start = static_cast<int32_t>(t);
        if (t < 16) { EXPECT_EQ(sample.document_start[static_cast<size_t>(t)], start); }
      }
    }
    EXPECT_EQ(seen.size(), 10u);
  }
  for (int32_t start : make(false).sample(3).document_start) EXPECT_EQ(start, 0);
}

// global_index = step * global_batch + slot: any number of data ranks reads the same batches.
TEST_F(Dataset, BatchesDoNotDependOnTheDataParallelSize) {
  const auto data = make(false, 2);
  const int64_t global_batch = 4;
  for (int64_t step = 0; step < 7; ++step)
    for (int64_t ranks : {1, 2, 4}) {
      std::vector<int64_t> batch;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const auto own = make(false, 2);  // another process
        for (int64_t slot = rank * global_batch / ranks; slot < (rank + 1) * global_batch / ranks; ++slot)
          batch.push_back(own.sample(step * global_batch + slot).tokens[0]);
      }
      for (int64_t slot = 0; slot < global_batch; ++slot)
        EXPECT_EQ(batch[static_cast<size_t>(slot)], data.sample(step * global_batch + slot).tokens[0]);
    }
}

TEST_F(Dataset, HeldOutSamplesAreNeverTrainedOn) {
  const auto data = make(true, 3);
  EXPECT_EQ(data.samples(), 7);
  EXPECT_EQ(data.held_out(0).tokens[0], 7 * 16);
  EXPECT_EQ(data.held_out(2).tokens[16], 160);
  EXPECT_THROW(data.held_out(3), std::out_of_range);
  for (int64_t i = 0; i < 50; ++i) EXPECT_LT(data.sample(i).tokens[0], 7 * 16);
  expect_contains(refusal([&] { make(true, 10); }), "10 are held out");
  EXPECT_NE(make(true, 3).digest(), make(true, 2).digest());
  EXPECT_NE(make(true, 3, 5).digest(), make(true, 3, 6).digest());
  EXPECT_EQ(make(true, 3).digest(), make(true, 3).digest());
}

TEST_F(Dataset, SourcesMustShareATokenizer) {
  write_token_file(dir_ / "c.h5", {256, 257}, {0, 2}, "dsatrain.tokens", "other");
  sources_.push_back(open_token_source(dir_ / "c.h5", 258, true));
  expect_contains(refusal([&] { make(false); }), "another tokenizer");
}

}  // namespace
}  // namespace dsa
