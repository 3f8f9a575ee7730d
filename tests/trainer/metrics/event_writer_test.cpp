// Record framing against a file that TensorBoard wrote, and the shape of our own files.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "tests/trainer/metrics/scratch_folder.h"
#include "trainer/metrics/event_writer.h"

namespace dsa {
namespace {

const std::string kGolden = DSA_GOLDEN "/tensorboard_events/";

template <class T>
T at(const std::string& bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

// The payloads of a file; every length and checksum is verified.
std::vector<std::string> payloads(const std::string& bytes) {
  std::vector<std::string> out;
  for (size_t offset = 0; offset < bytes.size();) {
    const auto length = at<uint64_t>(bytes, offset);
    EXPECT_EQ(at<uint32_t>(bytes, offset + 8), masked_crc32c(std::string_view(bytes).substr(offset, 8)));
    out.push_back(bytes.substr(offset + 12, length));
    EXPECT_EQ(at<uint32_t>(bytes, offset + 12 + length), masked_crc32c(out.back()));
    offset += 16 + length;
  }
  return out;
}

TEST(Records, ChecksumsOfTheGoldenFile) {
  const std::string bytes = read_whole(kGolden + "events.out.tfevents.1700000000.fixture");
  const auto expected = nlohmann::json::parse(read_whole(kGolden + "expected.json"))["records"];
  ASSERT_EQ(expected.size(), 8u);
  for (const auto& record : expected) {
    const size_t offset = record["offset"], length = record["length"];
    EXPECT_EQ(masked_crc32c(std::string_view(bytes).substr(offset, 8)), record["masked_crc_of_length"].get<uint32_t>());
    EXPECT_EQ(masked_crc32c(std::string_view(bytes).substr(offset + 12, length)), record["masked_crc_of_data"].get<uint32_t>());
    EXPECT_EQ(frame_record(bytes.substr(offset + 12, length)), bytes.substr(offset, length + 16));
  }
}

TEST(Records, CheckVectorOfCrc32c) {
  // CRC32C("123456789") = e3069283; the mask of it by hand.
  const uint32_t crc = 0xe3069283u;
  EXPECT_EQ(masked_crc32c("123456789"), ((crc >> 15) | (crc << 17)) + 0xa282ead8u);
  EXPECT_EQ(masked_crc32c(""), 0xa282ead8u);
}

TEST(EventWriter, WritesTheBytesThatTensorBoardWrites) {
  const ScratchFolder folder;
  std::string written;
  {
    EventWriter writer(folder.path(), 1);
    writer.write(0, 1700000000.5, {{"loss/lm", 11.75}});
    writer.write(1, 1700000001.5, {{"loss/lm", 11.5}});
    writer.write(1, 1700000002.5, {{"loss/indexer_kl", 0.0}});
    writer.write(int64_t{1} << 33, 1700000004.5, {{"loss/lm", std::nan("")}});
    written = read_whole(writer.path());
  }
  const std::vector<std::string> ours = payloads(written);
  const std::vector<std::string> golden = payloads(read_whole(kGolden + "events.out.tfevents.1700000000.fixture"));
  ASSERT_EQ(ours.size(), 5u);
  EXPECT_EQ(ours[0].substr(9), golden[0].substr(9)) << "the file version, but for its time";
  EXPECT_EQ(ours[1], golden[1]);
  EXPECT_EQ(ours[2], golden[2]);
  EXPECT_EQ(ours[3], golden[3]) << "a zero is a value";
  EXPECT_EQ(ours[4], golden[5]);
}

TEST(EventWriter, NamesSortInTheOrderOfStarting) {
  const ScratchFolder folder;
  std::vector<std::string> names;
  for (int i = 0; i < 5; ++i) names.push_back(EventWriter(folder.path(), 1).path());
  for (size_t i = 0; i + 1 < names.size(); ++i) EXPECT_LT(names[i], names[i + 1]);
  const std::string name = std::filesystem::path(names[0]).filename();
  EXPECT_EQ(name.rfind("events.out.tfevents.", 0), 0u);
  EXPECT_EQ(name.find('.', 20), 30u) << "ten digits of seconds: " << name;
}

TEST(EventWriter, EveryWriteIsVisibleAtOnce) {
  const ScratchFolder folder;
  EventWriter writer(folder.path(), 1);
  for (int step = 1; step <= 3; ++step) {
    writer.write(step, step, {{"a", 1.0}, {"b", 2.0}});
    EXPECT_EQ(payloads(read_whole(writer.path())).size(), static_cast<size_t>(step) + 1);
  }
}

TEST(EventWriter, MissingFolderIsAnErrorWithItsReason) {
  try {
    EventWriter("/nowhere/at/all", 1);
    FAIL();
  } catch (const std::system_error& error) {
    EXPECT_NE(std::string(error.what()).find("No such file"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace dsa
