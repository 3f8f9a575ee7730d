#include "data/hf_folder.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "data/float_formats.h"
#include "data/hf_names.h"
#include "tests/data/temp_folder.h"

namespace dsa {
namespace {

using namespace testing_support;
namespace fs = std::filesystem;
using nlohmann::json;

std::vector<float> whole(const HfFolder& folder, const std::string& name) {
  const auto& shape = folder.shape(name);
  const int64_t rows = shape.size() == 2 ? shape[0] : 1, cols = shape.back();
  std::vector<float> values(static_cast<size_t>(rows * cols));
  folder.read_rows(name, 0, rows, 0, cols, values.data());
  return values;
}

// Dequantised values, rounded to bfloat16, are bit-equal to what the fixture's own program made of the same files:
// partial blocks, scales in other shards, and o_proj, whose scales are no powers of two.
TEST(HfFolder, DequantisesBitEqual) {
  const HfFolder folder(golden("hf_v31_tiny_fp8"));
  const SafetensorsFile expected(golden("expected_bf16_tiny_fp8.safetensors"));
  int compared = 0;
  for (const TensorEntry& entry : expected.entries()) {
    const bool unrounded = entry.name.ends_with(".f32");
    const std::string name = unrounded ? entry.name.substr(0, entry.name.size() - 4) : entry.name;
    const std::vector<float> mine = whole(folder, name);
    ASSERT_EQ(folder.shape(name), entry.shape);
    if (unrounded) {
      std::vector<float> theirs(mine.size());
      expected.read(entry, 0, entry.bytes(), theirs.data());
      EXPECT_EQ(mine, theirs) << name;
    } else {
      std::vector<uint16_t> theirs(mine.size()), rounded(mine.size());
      expected.read(entry, 0, entry.bytes(), theirs.data());
      std::transform(mine.begin(), mine.end(), rounded.begin(), float_to_bf16);
      EXPECT_EQ(rounded, theirs) << name;
    }
    ++compared;
  }
  EXPECT_GE(compared, 38);
}

// Every slice is the same part of the whole tensor.
TEST(HfFolder, SlicesOfEveryDtype) {
  for (const char* model : {"hf_v31_tiny_fp8", "hf_v31_tiny", "hf_v32_tiny"}) {
    const HfFolder folder(golden(model));
    const std::string name = "model.layers.0.mlp.down_proj.weight";  // 144 x 136 FP8, 128 x 192 BF16 and F32
    const auto all = whole(folder, name);
    const int64_t height = folder.shape(name)[0], width = folder.shape(name)[1];
    for (const auto& [row0, rows, col0, cols] :
         {std::array<int64_t, 4>{0, height, 3, 7}, {120, 8, 0, width}, {127, height - 127, 126, width - 126}, {5, 1, 129, 2}, {0, 0, 0, 0}}) {
      std::vector<float> slice(static_cast<size_t>(rows * cols));
      folder.read_rows(name, row0, rows, col0, cols, slice.data());
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c)
          ASSERT_EQ(slice[static_cast<size_t>(r * cols + c)], all[static_cast<size_t>((row0 + r) * width + col0 + c)]);
    }
    float out[8];
    EXPECT_THROW(folder.read_rows(name, height, 1, 0, 1, out), std::out_of_range);
    EXPECT_THROW(folder.read_rows(name, 0, 1, width - 1, 2, out), std::out_of_range);
    const auto norm = whole(folder, "model.norm.weight");  // [n] is read as [1, n]
    folder.read_rows("model.norm.weight", 0, 1, 5, 3, out);
    EXPECT_EQ(out[2], norm[7]);
    expect_contains(refusal([&] { folder.read_rows("model.nothing", 0, 1, 0, 1, out); }), "does not have it");
  }
}

// hf_v31_tiny (BF16) and hf_v32_tiny (F32) hold the same values.
TEST(HfFolder, Bf16AndF32HoldTheSameModel) {
  const HfFolder v31(golden("hf_v31_tiny")), v32(golden("hf_v32_tiny"));
  EXPECT_EQ(v31.stored_dtype("lm_head.weight"), Dtype::BF16);
  EXPECT_EQ(v32.stored_dtype("lm_head.weight"), Dtype::F32);
  for (const std::string& name : v31.names()) EXPECT_EQ(whole(v31, name), whole(v32, name)) << name;
}

TEST(HfFolder, TablesOfNamesAgreeWithTheFolders) {
  for (const char* model : {"hf_v31_tiny_fp8", "hf_v31_tiny", "hf_v32_tiny"}) {
    const HfFolder folder(golden(model));
    EXPECT_NO_THROW(folder.check_against(folder.config()));
    const auto stored = hf_stored_tensors(folder.config(), folder.config().format(),
                                          folder.config().fp8 ? HfDtype::FP8 : HfDtype::BF16);
    EXPECT_EQ(stored.size(), folder.names().size());
    for (const StoredTensor& tensor : stored) {
      EXPECT_EQ(tensor.shape, folder.shape(tensor.name)) << tensor.name;
      if (std::string(model) != "hf_v32_tiny") { EXPECT_EQ(tensor.dtype, folder.stored_dtype(tensor.name)) << tensor.name; }
    }
  }
  const HfFolder v31(golden("hf_v31_tiny")), v32(golden("hf_v32_tiny"));
  EXPECT_NO_THROW(v31.check_against(v32.config()));  // the model brings the indexer that V3.1 lacks
  expect_contains(refusal([&] { v32.check_against(v31.config()); }), "has an indexer");
  ModelConfig other = v31.config();
  other.num_hidden_layers = 3;
  other.moe_intermediate_size = 80;
  other.n_routed_experts = 12;
  const std::string message = refusal([&] { v31.check_against(other); });
  expect_contains(message, "missing: model.layers.1.mlp.experts.8.gate_proj.weight");
  expect_contains(message, "unexpected: model.layers.3.");
  expect_contains(message, "is [64, 128] instead of [80, 128]");
}

class BadFolder : public ::testing::Test {
 protected:
  BadFolder() { fs::copy(golden("hf_v31_tiny_fp8"), folder()); }
  std::string folder() const { return dir_ / "model"; }
  std::string index() const { return folder() + "/model.safetensors.index.json"; }
  std::string opening() const { return refusal([&] { HfFolder f(folder()); }); }
  template <class Edit>
  void edit_index(Edit&& edit) {
    json j = json::parse(get_file(index()));
    edit(j);
    put_file(index(), j.dump());
  }
  // Rewrites one shard with tensors changed, left out or added.
  template <class Edit>
  void edit_shard(const std::string& name, Edit&& edit) {
    const std::string path = folder() + "/" + name;
    std::vector<TensorInfo> infos;
    std::map<std::string, std::string> data;
    {
      const SafetensorsFile file(path);
      for (const auto& entry : file.entries()) {
        infos.push_back({entry.name, entry.dtype, entry.shape});
        data[entry.name].resize(entry.bytes());
        file.read(entry, 0, entry.bytes(), data[entry.name].data());
      }
    }
    edit(infos);
    SafetensorsWriter writer(path, infos, {}, true);
    for (const auto& info : infos) {
      data[info.name].resize(tensor_bytes(info.dtype, info.shape));
      writer.write(info.name, data[info.name].data());
    }
    writer.commit();
  }
  TempFolder dir_;
};

TEST_F(BadFolder, IsRefusedWithItsReason) {
  EXPECT_EQ(opening(), "no InputError");
  const std::string shard2 = "model-00002-of-000003.safetensors", shard3 = "model-00003-of-000003.safetensors";
  fs::rename(folder() + "/" + shard2, dir_ / "aside");
  expect_contains(opening(), "missing shards: " + shard2);
  const std::string bytes = get_file(dir_ / "aside");
  put_file(folder() + "/" + shard2, bytes.substr(0, bytes.size() - 1));
  expect_contains(opening(), shard2);
  expect_contains(opening(), "truncated");
  fs::rename(dir_ / "aside", folder() + "/" + shard2);

  const std::string good = get_file(index());
  edit_index([](json& j) { j["weight_map"].erase("lm_head.weight"); });
  expect_contains(opening(), "the index does not list lm_head.weight in " + shard2);
  edit_index([&](json& j) { j["weight_map"]["lm_head.weight"] = shard3; });
  expect_contains(opening(), "lm_head.weight");
  put_file(index(), good);
  edit_index([&](json& j) { j["weight_map"]["extra.weight"] = shard3; });
  expect_contains(opening(), "lists what shards lack: extra.weight");
  edit_index([&](json& j) { j["weight_map"]["extra.weight"] = "../" + shard3; });
  expect_contains(opening(), "not a .safetensors file of this folder");
  put_file(index(), "{\"weight_map\":{\"a\":\"x.safetensors\",\"a\":\"y.safetensors\"}}");
  expect_contains(opening(), "is there twice");
  put_file(index(), "{}");
  expect_contains(opening(), "no weight_map");
  put_file(index(), good);
  edit_index([](json& j) { j["metadata"]["total_size"] = "rubbish"; });  // never looked at
  EXPECT_EQ(opening(), "no InputError");
  put_file(index(), good);

  fs::remove(index());
  expect_contains(opening(), "neither");
  put_file(index(), good);
  fs::remove(folder() + "/config.json");
  expect_contains(opening(), "config.json");
  expect_contains(refusal([&] { HfFolder f(dir_ / "nowhere"); }), "not a folder");
}

TEST_F(BadFolder, ScalesMustFit) {
  const std::string shard = "model-00002-of-000003.safetensors", scale = "model.layers.1.self_attn.q_a_proj.weight_scale_inv";
  const std::string good = get_file(folder() + "/" + shard);
  edit_shard(shard, [&](auto& infos) {
    for (auto& info : infos)
      if (info.name == scale) info.shape = {2, 2};
  });
  expect_contains(opening(), scale + " is F32 [2, 2] where F32 [1, 2] is needed");
  put_file(folder() + "/" + shard, good);
  edit_shard(shard, [&](auto& infos) { std::erase_if(infos, [&](const auto& info) { return info.name == scale; }); });
  edit_index([&](json& j) { j["weight_map"].erase(scale); });
  expect_contains(opening(), "is F8_E4M3 without " + scale);
  edit_shard(shard, [&](auto& infos) {
    for (auto& info : infos)
      if (info.name + "_scale_inv" == scale) info.dtype = Dtype::I8;
    infos.push_back({scale, Dtype::F32, {1, 2}});
  });
  edit_index([&](json& j) { j["weight_map"][scale] = shard; });
  expect_contains(opening(), scale + " belongs to no F8_E4M3 weight");
  edit_shard(shard, [&](auto& infos) { std::erase_if(infos, [&](const auto& info) { return info.name == scale; }); });
  edit_index([&](json& j) { j["weight_map"].erase(scale); });
  const HfFolder integers(folder());
  expect_contains(refusal([&] { integers.check_against(integers.config()); }), "has dtype I8");
}

TEST(HfFolder, SingleFileFolder) {
  TempFolder dir;
  fs::create_directory(dir / "one");
  fs::copy(golden("hf_v32_tiny/config.json"), dir / "one/config.json");
  fs::copy(golden("hf_v32_tiny/model-00001-of-000003.safetensors"), dir / "one/model.safetensors");
  const HfFolder folder(dir / "one");
  EXPECT_TRUE(folder.has("model.embed_tokens.weight"));
  expect_contains(refusal([&] { folder.check_against(folder.config()); }), "missing: ");
}

TEST_F(BadFolder, DigestNamesTheContent) {
  const std::string before = HfFolder(folder()).digest();
  EXPECT_EQ(before.size(), 32u);
  EXPECT_EQ(before, HfFolder(golden("hf_v31_tiny_fp8")).digest());  // not the path
  edit_index([](json& j) { j["metadata"]["total_size"] = 1; });
  const std::string edited = HfFolder(folder()).digest();
  EXPECT_NE(before, edited);
  // Other weights under the same headers: the last byte of a shard.
  const fs::path shard = fs::path(folder()) / "model-00001-of-000003.safetensors";
  std::fstream file(shard, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(-1, std::ios::end);
  const char last = static_cast<char>(file.get());
  file.seekp(-1, std::ios::end);
  file.put(static_cast<char>(last ^ 1));
  file.close();
  EXPECT_NE(edited, HfFolder(folder()).digest());
}

}  // namespace
}  // namespace dsa
