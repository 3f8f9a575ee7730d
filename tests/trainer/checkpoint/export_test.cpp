// Exported folders against the golden ones: bytes where they stay, values where they do not.
#include "trainer/checkpoint/export.h"

#include <cmath>
#include <fstream>

#include "data/error.h"
#include "data/float_formats.h"
#include "data/safetensors.h"
#include "warmed_model.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;
using test::kFp8;

std::vector<char> raw(const HfFolder& folder, const std::string& name) {
  std::vector<char> bytes(folder.raw_bytes(name));
  folder.read_raw(name, 0, bytes.size(), bytes.data());
  return bytes;
}

std::vector<float> values(const HfFolder& folder, const std::string& name) {
  const std::vector<int64_t>& shape = folder.shape(name);
  std::vector<float> out(numel(shape));
  folder.read_rows(name, 0, shape.size() == 2 ? shape[0] : 1, 0, shape.back(), out.data());
  return out;
}

bool is_o_proj(const std::string& name) { return name.find(".o_proj.") != std::string::npos; }

void expect_powers_of_two(const HfFolder& folder) {
  for (const std::string& name : folder.names())
    if (name.ends_with("_scale_inv"))
      for (float scale : values(folder, name)) {
        int exponent;
        EXPECT_EQ(std::frexp(scale, &exponent), 0.5f) << name;
      }
}

// Requantising moves a weight by at most half a step of e4m3 (2^-4 relative), or half a subnormal step (2^-10 scale).
void expect_requantised(const std::vector<float>& got, const std::vector<float>& expected, const std::string& name) {
  float largest = 0;
  for (float e : expected) largest = std::max(largest, std::abs(e));
  for (size_t i = 0; i < got.size(); ++i)
    ASSERT_LE(std::abs(got[i] - expected[i]), std::abs(expected[i]) / 16 + largest / 224 / 1024) << name;
}

TEST(Export, UntrainedFp8KeepsItsBytes) {
  test::TempFolder out("export-fp8");
  const auto source = open_weights(kFp8);
  uint64_t last = 0, total = 0;
  export_checkpoint(*source, out / "to", {.format = HfFormat::V31}, [&](uint64_t done, uint64_t all, const std::string&) {
    EXPECT_GT(done, last);
    last = done;
    total = all;
  });
  EXPECT_EQ(last, total);
  const HfFolder before(kFp8), after(out / "to");
  after.check_against(before.config());
  EXPECT_EQ(after.names(), before.names());
  EXPECT_EQ(after.names().size(), 145u);
  int kept = 0;
  for (const std::string& name : before.names()) {
    EXPECT_EQ(after.stored_dtype(name), before.stored_dtype(name)) << name;
    if (is_o_proj(name)) continue;
    EXPECT_EQ(raw(after, name), raw(before, name)) << name;
    ++kept;
  }
  EXPECT_EQ(kept, 145 - 2 * 3);
  for (int layer = 0; layer < 3; ++layer) {
    const std::string name = "model.layers." + std::to_string(layer) + ".self_attn.o_proj.weight";
    expect_requantised(values(after, name), values(before, name), name);
    EXPECT_NE(raw(after, name + "_scale_inv"), raw(before, name + "_scale_inv"));
  }
  expect_powers_of_two(after);
}

TEST(Export, Bf16AndFp32HaveTheDequantisedValues) {
  const auto source = open_weights(kFp8);
  const SafetensorsFile golden(std::string(DSA_GOLDEN) + "/expected_bf16_tiny_fp8.safetensors");
  const auto golden_bytes = [&](const TensorEntry& e) {
    std::vector<char> bytes(e.end - e.begin);
    golden.read(e, 0, bytes.size(), bytes.data());
    return bytes;
  };
  for (HfDtype dtype : {HfDtype::BF16, HfDtype::FP32}) {
    test::TempFolder out("export-wide");
    export_checkpoint(*source, out / "to", {.format = {}, .dtype = dtype});
    const HfFolder after(out / "to");
    EXPECT_FALSE(after.config().fp8);
    EXPECT_FALSE(after.config().indexer);  // the default format follows the source
    size_t compared = 0, o_proj_f32 = 0;
    for (const std::string& name : after.names()) EXPECT_FALSE(name.ends_with("_scale_inv")) << name;
    for (const TensorEntry& entry : golden.entries()) {
      if (entry.name.ends_with(".f32")) {
        ++o_proj_f32;
        if (dtype != HfDtype::FP32) continue;
        const std::string name = entry.name.substr(0, entry.name.size() - 4);
        EXPECT_EQ(raw(after, name), golden_bytes(entry)) << name;
        continue;
      }
      ASSERT_EQ(entry.dtype, Dtype::BF16) << entry.name;
      const std::vector<char> expected = golden_bytes(entry);
      if (dtype == HfDtype::BF16) {
        EXPECT_EQ(raw(after, entry.name), expected) << entry.name;
      } else if (!is_o_proj(entry.name)) {
        const std::vector<float> got = values(after, entry.name);
        for (size_t i = 0; i < got.size(); ++i) {
          uint16_t bits;
          std::memcpy(&bits, expected.data() + 2 * i, 2);
          ASSERT_EQ(got[i], bf16_to_float(bits)) << entry.name;
        }
      }
      ++compared;
    }
    EXPECT_EQ(o_proj_f32, 3u);
    EXPECT_EQ(compared, golden.entries().size() - 3);
  }
}

TEST(Export, V32InFp32IsTheSameFolderAgain) {
  const std::string golden = std::string(DSA_GOLDEN) + "/hf_v32_tiny";
  test::TempFolder out("export-v32");
  export_checkpoint(*open_weights(golden), out / "to", {.format = {}, .dtype = HfDtype::FP32});
  const HfFolder before(golden), after(out / "to");
  ASSERT_EQ(after.names(), before.names());
  EXPECT_TRUE(after.config().indexer);
  for (const std::string& name : before.names()) {
    EXPECT_EQ(after.stored_dtype(name), before.stored_dtype(name)) << name;
    EXPECT_EQ(raw(after, name), raw(before, name)) << name;
  }
  // And as V3.1 the indexer is gone, the rest the same.
  export_checkpoint(*open_weights(golden), out / "v31", {.format = HfFormat::V31, .dtype = HfDtype::FP32});
  const HfFolder v31(out / "v31");
  EXPECT_FALSE(v31.config().indexer);
  size_t indexer = 0;
  for (const std::string& name : before.names()) {
    if (test::is_indexer(name)) {
      ++indexer;
      EXPECT_FALSE(v31.has(name));
    } else {
      EXPECT_EQ(raw(v31, name), raw(before, name)) << name;
    }
  }
  EXPECT_EQ(v31.names().size() + indexer, before.names().size());
}

TEST(Export, WarmedCheckpointBecomesV32) {
  test::TempFolder out("export-warm");
  test::save_warmed(out / "run", kFp8);
  const auto source = open_weights(out / "run");
  export_checkpoint(*source, out / "to", {});
  const HfFolder before(kFp8), after(out / "to");
  ASSERT_TRUE(after.config().indexer);
  after.check_against(after.config());
  expect_powers_of_two(after);
  for (const HfTensor& tensor : hf_tensors(after.config(), HfFormat::V32)) {
    const std::string& name = tensor.name;
    EXPECT_EQ(after.stored_dtype(name), hf_stored_dtype(tensor.kind, HfFormat::V32, HfDtype::FP8)) << name;
    const std::vector<float> got = values(after, name);
    if (test::is_indexer(name)) {
      const std::vector<float> expected = test::indexer_values(tensor);
      if (tensor.kind == HfTensor::Kind::LINEAR_FP8) {
        expect_requantised(got, expected, name);
      } else if (tensor.kind == HfTensor::Kind::INDEXER_NORM) {
        EXPECT_EQ(got, expected) << name;
      } else {
        for (size_t i = 0; i < got.size(); ++i)
          ASSERT_EQ(got[i], bf16_to_float(float_to_bf16(expected[i]))) << name;
      }
    } else if (is_o_proj(name)) {
      expect_requantised(got, values(before, name), name);
    } else if (tensor.kind == HfTensor::Kind::NORM) {  // BF16 in V3.1, F32 in V3.2
      EXPECT_EQ(got, values(before, name)) << name;
    } else {
      EXPECT_EQ(raw(after, name), raw(before, name)) << name;
      if (tensor.kind == HfTensor::Kind::LINEAR_FP8) {
        EXPECT_EQ(raw(after, hf_scale_name(name)), raw(before, hf_scale_name(name))) << name;
      }
    }
  }
}

TEST(Export, Refusals) {
  test::TempFolder out("export-bad");
  const auto refusal = [&](const WeightSource& source, const std::string& to, const ExportOptions& options) -> std::string {
    try {
      export_checkpoint(source, to, options);
    } catch (const InputError& e) {
      return e.what();
    }
    return "accepted";
  };
  const auto source = open_weights(kFp8);
  EXPECT_NE(refusal(*source, out / "to", {.format = HfFormat::V32}).find("run the warm-up stage first"), std::string::npos);
  fs::create_directory(out / "there");
  std::ofstream(out / "there/mine.txt") << "precious";
  EXPECT_NE(refusal(*source, out / "there", {}).find("exists already"), std::string::npos);
  EXPECT_EQ(std::distance(fs::directory_iterator(out / "there"), fs::directory_iterator()), 1);
  // A checkpoint that lacks a tensor of its model: refused by name, and nothing is left.
  std::vector<float> norm(144, 1.0f);
  TrainingState state = test::synthetic_facts(1);
  state.model_json = source->config().to_json(HfFormat::V31, HfDtype::FP32);
  LocalCommunicator world;
  const std::vector<StateShard> shards{{Role::PARAM, whole("model.norm.weight", {144}), Dtype::F32, norm.data()}};
  ASSERT_TRUE(save_checkpoint(out / "run", state, shards, world, 1).committed);
  const std::string words = refusal(*open_weights(out / "run"), out / "to", {});
  EXPECT_NE(words.find("model.embed_tokens.weight is missing"), std::string::npos) << words;
  for (const auto& entry : fs::directory_iterator(out.path()))
    EXPECT_TRUE(entry.path().filename() == "there" || entry.path().filename() == "run") << entry.path();
}

}  // namespace
}  // namespace dsa
