#include "data/token_source.h"

#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "data/hdf5_file.h"
#include "data/hdf5_tokens.h"
#include "data/megatron_index.h"
#include "tests/data/token_file.h"

namespace dsa {
namespace {

using namespace testing_support;

TEST(MegatronTokens, ReadsWhatMegatronWrote) {
  const auto expected = nlohmann::json::parse(get_file(golden("megatron_index/expected.json")))["datasets"];
  for (const auto& item : expected.items()) {
    std::vector<int32_t> ids;
    std::vector<int64_t> starts;
    for (const auto& document : item.value()["documents"]) {
      const size_t before = ids.size();
      for (const auto& sequence : document)
        for (int32_t id : sequence) ids.push_back(id);
      if (ids.size() > before) starts.push_back(static_cast<int64_t>(before));
    }
    for (const char* suffix : {"", ".idx", ".bin"}) {
      const auto source = open_token_source(golden("megatron_index/" + item.key()) + suffix, 129280, true);
      ASSERT_EQ(source->size(), static_cast<int64_t>(ids.size()));
      EXPECT_EQ(source->documents(), static_cast<int64_t>(item.value()["documents"].size()));
      std::vector<int32_t> back(ids.size());
      source->read(0, source->size(), back.data());
      EXPECT_EQ(back, ids);
      source->read(3, 2, back.data());
      EXPECT_EQ(back[0], ids[3]);
      EXPECT_EQ(source->document_starts(0, source->size()), starts);
      EXPECT_EQ(source->document_starts(1, starts[1]), std::vector<int64_t>{});
      EXPECT_EQ(source->document_starts(starts[1], starts[1] + 1), std::vector<int64_t>{starts[1]});
    }
  }
  expect_contains(refusal([&] { open_token_source(golden("megatron_index/wide_int32"), 65536, true); }), "vocabulary ends at 65536");
  EXPECT_NO_THROW(open_token_source(golden("megatron_index/wide_int32"), 65536, false));
}

TEST(MegatronTokens, DamagedFilesAreRefused) {
  const std::string idx = get_file(golden("megatron_index/wide_int32.idx")), bin = get_file(golden("megatron_index/wide_int32.bin"));
  const auto opening = [&](const std::string& i, const std::string& b) {
    TempFolder dir;
    put_file(dir / "d.idx", i);
    put_file(dir / "d.bin", b);
    return refusal([&] { open_token_source(dir / "d", 129280, true); });
  };
  const auto with = [&](size_t at, char value) {
    std::string changed = idx;
    changed[at] = value;
    return changed;
  };
  const size_t lengths = 34, pointers = lengths + 7 * 4, borders = pointers + 7 * 8;
  EXPECT_EQ(opening(idx, bin), "no InputError");
  expect_contains(opening(idx.substr(0, 20), bin), "shorter than its header");
  expect_contains(opening(with(0, 'X'), bin), "MMIDIDX");
  expect_contains(opening(with(9, 2), bin), "version 2");
  expect_contains(opening(with(17, 7), bin), "no integer type");
  expect_contains(opening(with(17, 8), bin), "does not follow");
  expect_contains(opening(with(18, 8), bin), "do not fill exactly");
  expect_contains(opening(with(25, 0x7f), bin), "do not fill exactly");
  expect_contains(opening(with(lengths, 5), bin), "does not follow");
  expect_contains(opening(with(lengths + 3, '\x80'), bin), "does not follow");
  expect_contains(opening(with(pointers + 8, 1), bin), "does not follow");
  expect_contains(opening(with(borders, 1), bin), "do not cover");
  expect_contains(opening(with(borders + 8, 7), bin), "out of order");
  expect_contains(opening(idx, bin.substr(1)), ".bin has");
  std::string negative = bin;
  negative[7] = '\xff';
  expect_contains(opening(idx, negative), "token 1 is -");
}

TEST(Hdf5Tokens, ReadsBack) {
  TempFolder dir;
  // More documents than one block of the index in memory, of lengths 1, 2, 3, 1, 2, 3, ..
  std::vector<int64_t> offsets{0};
  for (int64_t d = 0; d < 10000; ++d) offsets.push_back(offsets.back() + 1 + d % 3);
  std::vector<uint32_t> ids(static_cast<size_t>(offsets.back()));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<uint32_t>(i * 7919 % 258);
  write_token_file(dir / "t.h5", ids, offsets);
  const auto source = open_token_source(dir / "t.h5", 258, true);
  EXPECT_EQ(source->size(), offsets.back());
  EXPECT_EQ(source->documents(), 10000);
  EXPECT_EQ(source->vocab_size(), 258);
  EXPECT_EQ(source->bos_id(), 256);
  EXPECT_EQ(source->eos_id(), 257);
  EXPECT_EQ(source->tokenizer_sha256(), "abc");
  std::vector<int32_t> back(100);
  source->read(5000, 100, back.data());
  for (size_t i = 0; i < 100; ++i) EXPECT_EQ(back[i], static_cast<int32_t>(ids[5000 + i]));
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, offsets.back()}, {0, 1}, {1, 2}, {8191, 8200}, {offsets[4096], offsets[4096] + 1},
                                   {offsets[4096] - 1, offsets[4097]}, {12345, 12345}, {offsets.back() - 1, offsets.back()}}) {
    std::vector<int64_t> expected;
    for (int64_t offset : offsets)
      if (offset >= begin && offset < end) expected.push_back(offset);
    EXPECT_EQ(source->document_starts(begin, end), expected) << begin << " " << end;
  }
  EXPECT_EQ(source->digest(), open_token_source(dir / "t.h5", 0, false)->digest());
  ids[17] ^= 1;
  write_token_file(dir / "u.h5", ids, offsets);
  EXPECT_NE(source->digest(), open_token_source(dir / "u.h5", 258, true)->digest());
  offsets[1] = 2;
  offsets[2] = 3;
  ids[17] ^= 1;
  write_token_file(dir / "v.h5", ids, offsets);
  EXPECT_NE(source->digest(), open_token_source(dir / "v.h5", 258, true)->digest());
}

TEST(Hdf5Tokens, DamagedFilesAreRefused) {
  const std::vector<uint32_t> ids{256, 1, 2, 257, 256, 3, 257};
  const auto opening = [&](const std::vector<uint32_t>& tokens, const std::vector<int64_t>& offsets, int64_t limit = 258,
                           const std::string& format = "dsatrain.tokens") {
    TempFolder dir;
    write_token_file(dir / "t.h5", tokens, offsets, format);
    return refusal([&] { open_token_source(dir / "t.h5", limit, true); });
  };
  EXPECT_EQ(opening(ids, {0, 4, 7}), "no InputError");
  expect_contains(opening(ids, {0, 4, 4, 7}), "does not exceed the one before");
  expect_contains(opening(ids, {1, 4, 7}), "is not 0");
  expect_contains(opening(ids, {0, 4}), "end at 4");
  expect_contains(opening(ids, {0}), "empty");
  expect_contains(opening({256, 258}, {0, 2}), "token 1 is 258");
  expect_contains(opening({256, 0xffffffffu}, {0, 2}), "token 1 is 4294967295");
  expect_contains(opening(ids, {0, 4, 7}, 257), "exceeds the model's 257");
  expect_contains(opening(ids, {0, 4, 7}, 258, "other"), "format");
  TempFolder dir;
  put_file(dir / "text", "only text");
  expect_contains(refusal([&] { open_token_source(dir / "text", 0, true); }), "tools/tokenize.py");
  expect_contains(refusal([&] { open_token_source(dir / "none", 0, true); }), "No such file");
}

}  // namespace
}  // namespace dsa
