#include "data/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "tests/data/temp_folder.h"

namespace dsa {
namespace {

using namespace testing_support;
namespace fs = std::filesystem;

std::string file_bytes(const std::string& header, const std::string& data) {
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[static_cast<size_t>(i)] = static_cast<char>(header.size() >> (8 * i));
  return bytes + header + data;
}

// Every file of the golden folder gets the verdict that cases.json asks for.
TEST(Safetensors, GoodAndMalformedFiles) {
  const auto cases = nlohmann::json::parse(get_file(golden("safetensors_bad/cases.json")))["cases"];
  int accepted = 0, refused = 0;
  std::set<std::string> messages;
  for (const auto& item : cases.items()) {
    const std::string path = golden("safetensors_bad/" + item.key() + ".safetensors");
    const std::string require = item.value()["require"];
    ASSERT_TRUE(fs::exists(path));
    const std::string message = refusal([&] { SafetensorsFile file(path); });
    const bool ok = message == "no InputError";
    if (require != "free") { EXPECT_EQ(ok, require == "accept") << item.key() << ": " << message; }
    ok ? ++accepted : ++refused;
    if (ok) {
      SafetensorsFile file(path);
      std::set<std::string> names;
      for (const auto& entry : file.entries()) names.insert(entry.name);
      EXPECT_EQ(names, item.value()["package"]["names"].get<std::set<std::string>>()) << item.key();
    } else {
      expect_contains(message, item.key());  // which file
      expect_contains(message, " (");
      expect_contains(message, "download");
    }
  }
  EXPECT_EQ(accepted + refused, 59);
  EXPECT_EQ(accepted, 12);
}

TEST(Safetensors, MessagesNameTheReason) {
  const auto message = [](const std::string& name) {
    return refusal([&] { SafetensorsFile file(golden("safetensors_bad/" + name + ".safetensors")); });
  };
  expect_contains(message("header_length_beyond_file"), "exceeds the file's");
  expect_contains(message("duplicate_escaped_name"), "is there twice");
  expect_contains(message("hole"), "begins at byte");
  expect_contains(message("data_cut"), "the file holds");
  expect_contains(message("bits_overflow"), "overflows");
  expect_contains(message("f4_odd"), "whole bytes");
  expect_contains(message("header_nul_padded"), "does not end with '}'");
  expect_contains(message("lowercase_dtype"), "unknown dtype");
  expect_contains(message("header_deep_nesting"), "nested deeper");
  EXPECT_EQ(message("overlap").find("no InputError"), std::string::npos);
}

// Released headers have odd lengths: data begin at an odd byte, and every element must still come out right.
TEST(Safetensors, OddHeader) {
  TempFolder dir;
  const float values[4] = {1.5f, -2.0f, 3.25f, 1e-30f};
  std::string header = R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})";
  if ((8 + header.size()) % 2 == 0) header += " ";
  put_file(dir / "odd.safetensors", file_bytes(header, std::string(reinterpret_cast<const char*>(values), 16)));
  SafetensorsFile file(dir / "odd.safetensors");
  float back[2] = {};
  file.read(*file.find("a"), 4, 8, back);
  EXPECT_EQ(back[0], -2.0f);
  EXPECT_EQ(back[1], 3.25f);
  EXPECT_THROW(file.read(*file.find("a"), 12, 8, back), std::out_of_range);
  EXPECT_EQ(file.find("b"), nullptr);
}

TEST(Safetensors, AFileThatShrinksIsRefused) {
  TempFolder dir;
  const std::string header = R"({"a":{"dtype":"U8","shape":[100],"data_offsets":[0,100]}})";
  put_file(dir / "x.safetensors", file_bytes(header, std::string(100, 'x')));
  SafetensorsFile file(dir / "x.safetensors");
  fs::resize_file(dir / "x.safetensors", 8 + header.size() + 50);
  char out[100];
  EXPECT_NO_THROW(file.read(*file.find("a"), 0, 50, out));
  expect_contains(refusal([&] { file.read(*file.find("a"), 0, 100, out); }), "leave files alone");
}

TEST(Safetensors, WriterOrdersPadsAndReadsBack) {
  TempFolder dir;
  const std::string path = dir / "w.safetensors";
  const std::vector<TensorInfo> infos{{"z", Dtype::U8, {3}},      {"b", Dtype::BF16, {2, 2}}, {"a", Dtype::BF16, {1}},
                                      {"f", Dtype::F32, {}},      {"e", Dtype::F64, {0, 5}},  {"c", Dtype::F8_E4M3, {4}},
                                      {"i\"q", Dtype::I64, {1}}};
  {
    SafetensorsWriter writer(path, infos, {{"format", "pt"}});
    const uint16_t b[4] = {1, 2, 3, 4};
    writer.write("b", 4, b + 2, 4);  // pieces, out of order
    writer.write("b", 0, b, 2);
    writer.write("b", 2, b + 1, 2);
    EXPECT_THROW(writer.write("b", 6, b, 2), std::logic_error);
    EXPECT_THROW(writer.write("b", 6, b, 4), std::out_of_range);
    EXPECT_THROW(writer.write("nobody", b), std::invalid_argument);
    EXPECT_THROW(writer.commit(), std::logic_error);
    EXPECT_FALSE(fs::exists(path));
    const int64_t i = -7;
    const float f = 0.5f;
    writer.write("z", "xyz");
    writer.write("a", b);
    writer.write("f", &f);
    writer.write("c", "abcd");
    EXPECT_FALSE(writer.complete());
    writer.write("i\"q", &i);
    EXPECT_TRUE(writer.complete());
    writer.commit();
  }
  EXPECT_EQ(dir.entries(), 1u);
  SafetensorsFile file(path);
  std::vector<std::string> order;
  for (const auto& entry : file.entries())
    if (entry.bytes() > 0) order.push_back(entry.name);
  EXPECT_EQ(order, (std::vector<std::string>{"i\"q", "f", "a", "b", "c", "z"}));  // dtype descending, then name
  EXPECT_EQ(static_cast<unsigned char>(get_file(path)[0]) % 8, 0);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  uint16_t b[4];
  file.read(*file.find("b"), 0, 8, b);
  EXPECT_EQ(b[0] + 10 * b[1] + 100 * b[2] + 1000 * b[3], 4321);
  EXPECT_EQ(file.find("e")->shape, (std::vector<int64_t>{0, 5}));
  EXPECT_TRUE(file.find("f")->shape.empty());

  expect_contains(refusal([&] { SafetensorsWriter again(path, infos); }), "exists already");
  { SafetensorsWriter dropped(path, infos, {}, true); }  // no commit: the old file stays, nothing is left beside it
  EXPECT_EQ(dir.entries(), 1u);
  SafetensorsWriter over(path, {{"n", Dtype::U8, {1}}}, {}, true);
  over.write("n", "1");
  over.commit();
  EXPECT_EQ(SafetensorsFile(path).entries().size(), 1u);
  EXPECT_THROW(SafetensorsWriter(dir / "d", {{"n", Dtype::U8, {1}}, {"n", Dtype::U8, {2}}}), std::invalid_argument);
  expect_contains(refusal([&] { SafetensorsWriter w(dir / "no/where", infos); }), "cannot create");
}

}  // namespace
}  // namespace dsa
