#include "data/hf_folder_writer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "data/float_formats.h"
#include "data/hf_folder.h"
#include "tests/data/release_config.h"
#include "tests/data/temp_folder.h"

namespace dsa {
namespace {

using namespace testing_support;
namespace fs = std::filesystem;

int64_t height(const std::vector<int64_t>& shape) { return shape.size() == 2 ? shape[0] : 1; }

std::vector<float> whole(const HfFolder& folder, const std::string& name) {
  const auto& shape = folder.shape(name);
  std::vector<float> values(static_cast<size_t>(height(shape) * shape.back()));
  folder.read_rows(name, 0, height(shape), 0, shape.back(), values.data());
  return values;
}

// Everything that `source` has, in pieces of 128 rows.
void write_all(HfFolderWriter& writer, const HfFolder& source) {
  for (const HfTensor& tensor : writer.tensors()) {
    if (!tensor.duplicate_of.empty()) continue;
    const auto values = whole(source, tensor.name);
    const int64_t rows = height(tensor.shape), cols = tensor.shape.back();
    for (int64_t r = 0; r < rows; r += 128)
      writer.write(tensor.name, values.data() + r * cols, r, std::min<int64_t>(128, rows - r));
  }
}

// FP8 -> float -> FP8: the same values where scales were powers of two; o_proj within half a step of its new scale.
TEST(HfFolderWriter, RequantisingKeepsTheValues) {
  TempFolder dir;
  const HfFolder source(golden("hf_v31_tiny_fp8"));
  HfFolderWriter writer(dir / "out", source.config(), HfFormat::V31, HfDtype::FP8, 200000);
  write_all(writer, source);
  EXPECT_EQ(writer.written_bytes(), writer.total_bytes());
  EXPECT_FALSE(fs::exists(dir / "out"));
  writer.commit();
  EXPECT_EQ(dir.entries(), 1u);

  const HfFolder out(dir / "out");
  EXPECT_GT(out.shard_count(), 1u);
  EXPECT_NO_THROW(out.check_against(source.config()));
  EXPECT_EQ(out.names(), source.names());
  int requantised = 0;
  for (const HfTensor& tensor : writer.tensors()) {
    EXPECT_EQ(out.stored_dtype(tensor.name), source.stored_dtype(tensor.name)) << tensor.name;
    const auto a = whole(source, tensor.name), b = whole(out, tensor.name);
    if (tensor.name.find(".o_proj.") == std::string::npos) {
      EXPECT_EQ(a, b) << tensor.name;
      continue;
    }
    ++requantised;
    double largest = 0, error = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      largest = std::max<double>(largest, std::fabs(a[i]));
      error = std::max<double>(error, std::fabs(a[i] - b[i]));
    }
    EXPECT_GT(error, 0) << "o_proj's scales were expected not to be powers of two";
    EXPECT_LE(error, largest / 16);  // 3 bits of mantissa: relative error at most 2^-4
  }
  EXPECT_EQ(requantised, 3);
  const auto index = nlohmann::json::parse(get_file(dir / "out/model.safetensors.index.json"));
  EXPECT_EQ(index["metadata"]["total_size"], writer.total_bytes());
  EXPECT_EQ(nlohmann::json::parse(get_file(dir / "out/config.json")),
            nlohmann::json::parse(get_file(golden("hf_v31_tiny_fp8/config.json"))));
}

TEST(HfFolderWriter, RawCopiesAreByteEqual) {
  TempFolder dir;
  const HfFolder source(golden("hf_v31_tiny_fp8"));
  HfFolderWriter writer(dir / "out", source.config(), HfFormat::V31, HfDtype::FP8);
  std::set<std::string> duplicates;
  for (const HfTensor& tensor : writer.tensors())
    if (!tensor.duplicate_of.empty()) duplicates.insert(tensor.name);
  EXPECT_EQ(duplicates.size(), 2u);
  EXPECT_THROW(writer.write_raw(*duplicates.begin(), 0, "x", 1), std::logic_error);
  for (const std::string& name : source.names()) {
    if (duplicates.count(name)) continue;
    EXPECT_EQ(writer.stored(name).dtype, source.stored_dtype(name));
    std::string bytes(source.raw_bytes(name), '\0');
    source.read_raw(name, 0, bytes.size(), bytes.data());
    writer.write_raw(name, 0, bytes.data(), bytes.size() / 2);
    writer.write_raw(name, bytes.size() / 2, bytes.data() + bytes.size() / 2, bytes.size() - bytes.size() / 2);
  }
  writer.commit();
  const HfFolder out(dir / "out");
  for (const std::string& name : source.names()) {
    std::string a(source.raw_bytes(name), '\0'), b(out.raw_bytes(name), '\1');
    source.read_raw(name, 0, a.size(), a.data());
    out.read_raw(name, 0, b.size(), b.data());
    EXPECT_EQ(a, b) << name;
  }
}

TEST(HfFolderWriter, BothFormatsInBf16AndFp32) {
  const HfFolder source(golden("hf_v32_tiny"));
  for (HfFormat format : {HfFormat::V31, HfFormat::V32})
    for (HfDtype dtype : {HfDtype::BF16, HfDtype::FP32}) {
      TempFolder dir;
      HfFolderWriter writer(dir / "a/b/out/", source.config(), format, dtype, 1 << 20);  // makes the folders above
      write_all(writer, source);
      writer.commit();
      const HfFolder out(dir / "a/b/out");
      EXPECT_NO_THROW(out.check_against(out.config()));
      EXPECT_EQ(out.config().indexer.has_value(), format == HfFormat::V32);
      EXPECT_EQ(out.stored_dtype("lm_head.weight"), dtype == HfDtype::FP32 ? Dtype::F32 : Dtype::BF16);
      EXPECT_EQ(out.stored_dtype("model.norm.weight"),
                dtype == HfDtype::FP32 || format == HfFormat::V32 ? Dtype::F32 : Dtype::BF16);
      for (const std::string& name : out.names()) EXPECT_EQ(whole(out, name), whole(source, name)) << name;
    }
}

TEST(HfFolderWriter, NothingHalfWritten) {
  TempFolder dir;
  const HfFolder source(golden("hf_v31_tiny_fp8"));
  {
    HfFolderWriter writer(dir / "out", source.config(), HfFormat::V31, HfDtype::FP8);
    const std::vector<float> rows(144 * 144, 1.0f);
    const std::string name = "model.layers.0.mlp.gate_proj.weight";  // [136, 144]
    EXPECT_THROW(writer.write(name, rows.data(), 0, 100), std::invalid_argument);
    EXPECT_THROW(writer.write(name, rows.data(), 8, 128), std::invalid_argument);
    EXPECT_THROW(writer.write(name, rows.data(), 0, 137), std::out_of_range);
    EXPECT_NO_THROW(writer.write(name, rows.data(), 128, 8));
    EXPECT_THROW(writer.write(name, rows.data(), 128, 8), std::logic_error);
    EXPECT_THROW(writer.write("nobody", rows.data(), 0, 1), std::invalid_argument);
    EXPECT_THROW(writer.commit(), std::logic_error);
  }
  EXPECT_EQ(dir.entries(), 0u);
  fs::create_directory(dir / "full");
  put_file(dir / "full/file", "mine");
  expect_contains(refusal([&] { HfFolderWriter w(dir / "full", source.config(), HfFormat::V31, HfDtype::FP8); }), "not empty");
  EXPECT_EQ(get_file(dir / "full/file"), "mine");
  fs::create_directory(dir / "empty");
  HfFolderWriter writer(dir / "empty", source.config(), HfFormat::V31, HfDtype::FP8);
  write_all(writer, source);
  put_file(dir / "full/tokenizer.json", "{}");
  writer.copy_tokenizer_files(dir / "full");
  writer.commit();
  EXPECT_EQ(get_file(dir / "empty/tokenizer.json"), "{}");
}

TEST(HfFolderWriter, PlansTheReleaseWithoutAModel) {
  const auto config = ModelConfig::from_json(kV32Config, "config.json");
  const auto shards = plan_hf_shards(config, HfFormat::V32, HfDtype::FP8, kDefaultShardBytes);
  EXPECT_GT(shards.size(), 150u);
  EXPECT_LT(shards.size(), 260u);
  uint64_t total = 0;
  size_t tensors = 0;
  std::set<std::string> names;
  char expected[64];
  for (size_t i = 0; i < shards.size(); ++i) {
    std::snprintf(expected, sizeof expected, "model-%05zu-of-%06zu.safetensors", i + 1, shards.size());
    EXPECT_EQ(shards[i].file, expected);
    uint64_t bytes = 0;
    std::set<std::string> here;
    for (const StoredTensor& t : shards[i].tensors) {
      bytes += tensor_bytes(t.dtype, t.shape);
      here.insert(t.name);
      names.insert(t.name);
    }
    for (const StoredTensor& t : shards[i].tensors)
      if (t.dtype == Dtype::F8_E4M3) { EXPECT_TRUE(here.count(hf_scale_name(t.name))) << t.name; }
    EXPECT_LE(bytes, kDefaultShardBytes);
    total += bytes;
    tensors += shards[i].tensors.size();
  }
  EXPECT_EQ(total, 689471107200u);
  EXPECT_EQ(tensors, 92425u);
  EXPECT_EQ(names.size(), 92425u);
}

}  // namespace
}  // namespace dsa
