// The manifest: what is written is read, and what is wrong is refused with its own message.
#include "trainer/checkpoint/manifest.h"

#include <gtest/gtest.h>

#include <cmath>

#include "data/digest.h"
#include "data/error.h"
#include "synthetic_state.h"

namespace dsa {
namespace {

Manifest example() {
  Manifest m;
  m.state = test::synthetic_facts(12);
  m.block_bytes = 1000;
  m.files = {{"shard-r0000.h5", {2500, "w0", {"a", "b", "c"}}}, {"shard-r0001.h5", {1000, "w1", {"d"}}}};
  m.entries[Role::PARAM]["x"] = {Dtype::F32, {4, 3}, {{0, 100, {{0, 0}, {3, 3}}}, {1, 0, {{3, 0}, {1, 3}}}}};
  m.entries[Role::BUFFER]["bias"] = {Dtype::F64, {}, {{0, 2492, {{}, {}}}}};
  m.entries[Role::MOMENT1]["empty"] = {Dtype::BF16, {0, 5}, {}};
  return m;
}

std::string refusal(const std::string& text) {
  try {
    Manifest::from_text(text, "M");
  } catch (const InputError& e) {
    return e.what();
  }
  return "accepted";
}

// Replaces a part of the text and puts the right hash at its end again.
std::string edited(const std::string& from, const std::string& to) {
  std::string text = example().to_text();
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  text.replace(at, from.size(), to);
  text.resize(text.find(",\"xxh3_128\":\"" + manifest_digest(text)));
  return text + ",\"xxh3_128\":\"" + xxh3_128_hex(text) + "\"}\n";
}

TEST(Manifest, RoundTrip) {
  const Manifest m = example();
  EXPECT_TRUE(Manifest::from_text(m.to_text(), "M") == m);
  Manifest nan = m;
  nan.state.scalars["nan"] = std::nan("");
  EXPECT_TRUE(std::isnan(Manifest::from_text(nan.to_text(), "M").state.scalars.at("nan")));
}

TEST(Manifest, AnyFlippedBitIsRefused) {
  const std::string text = example().to_text();
  for (size_t i = 0; i + 1 < text.size(); ++i) {  // but for the newline at the end
    std::string bad = text;
    bad[i] = static_cast<char>(bad[i] ^ (1 << (i % 7)));
    EXPECT_NE(refusal(bad), "accepted") << "byte " << i;
  }
  EXPECT_NE(refusal(text.substr(0, text.size() / 2)), "accepted");
  EXPECT_NE(refusal(text + "{}"), "accepted");
  EXPECT_NE(refusal(""), "accepted");
}

TEST(Manifest, RefusalsNameTheReason) {
  const auto says = [](const std::string& text, const std::string& words) {
    EXPECT_NE(refusal(text).find(words), std::string::npos) << refusal(text) << "\n  should say: " << words;
  };
  says(edited("\"version\":1", "\"version\":2"), "has version 2 (this program reads version 1) use the newer program");
  says(edited("\"version\":1", "\"version\":0"), "has version 0");
  says(edited("dsatrain.checkpoint", "other.checkpoint"), "not a dsatrain checkpoint");
  says(edited("[3,3]", "[2,3]"), "the boxes hold 9 of 12 elements");
  says(edited("[3,0],[1,3]", "[2,0],[2,3]"), "overlap");
  says(edited("[3,0],[1,3]", "[3,0],[2,3]"), "leaves its shape");
  says(edited("[[0,100,", "[[0,2490,"), "leaves its file");
  says(edited("[[0,100,", "[[7,100,"), "not listed");
  says(edited("[[0,100,", "[[0,-100,"), "non-negative");
  says(edited("\"shape\":[4,3]", "\"shape\":[9223372036854775807,3]"), "too many elements");
  says(edited("\"shape\":[4,3]", "\"shape\":[9223372036854775808,3]"), "63-bit");
  says(edited("\"shape\":[4,3]", "\"shape\":[4.5,3]"), "63-bit");
  says(edited("\"F32\"", "\"F8_E4M3\""), "dtype F8_E4M3");
  says(edited("shard-r0001.h5", "../r0001.h5"), "not the name of a file in this folder");
  says(edited("[\"a\",\"b\",\"c\"]", "[\"a\",\"b\"]"), "block hashes");
  says(edited("\"step\":12", "\"stop\":12"), "has no 'step'");
  says(edited("\"step\":12", "\"step\":12,\"step\":13"), "step");
  std::string unhashed = example().to_text();
  unhashed.replace(unhashed.find("\"step\":12"), 9, "\"step\":13");
  says(unhashed, "damaged or edited");
}

}  // namespace
}  // namespace dsa
