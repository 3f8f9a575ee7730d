#include "data/model_config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "data/hf_names.h"
#include "data/safetensors.h"
#include "tests/data/release_config.h"
#include "tests/data/temp_folder.h"

namespace dsa {
namespace {

using namespace testing_support;
using nlohmann::json;

std::string refused(const json& config) {
  return refusal([&] { ModelConfig::from_json(config.dump(), "config.json"); });
}

TEST(ModelConfig, ReadsTheRelease) {
  const ModelConfig c = ModelConfig::from_json(kV32Config, "config.json");
  EXPECT_EQ(c.vocab_size, 129280);
  EXPECT_EQ(c.qk_head_dim(), 192);
  EXPECT_EQ(c.total_layers(), 62);
  EXPECT_FALSE(c.is_moe(2));
  EXPECT_TRUE(c.is_moe(3));
  EXPECT_TRUE(c.is_moe(61));
  EXPECT_TRUE(c.fp8);
  EXPECT_TRUE(c.rope.yarn);
  EXPECT_EQ(c.rope.factor, 40.0);
  EXPECT_EQ(c.indexer->top_k, 2048);
  EXPECT_NEAR(c.softmax_scale(), 0.1352337788608801, 1e-15);
}

TEST(ModelConfig, ReadsTheTinyFolders) {
  const auto v31 = ModelConfig::from_json_file(golden("hf_v31_tiny/config.json"));
  const auto v32 = ModelConfig::from_json_file(golden("hf_v32_tiny/config.json"));
  EXPECT_FALSE(v31.indexer);
  EXPECT_EQ(v32.indexer->head_dim, 16);
  EXPECT_NEAR(v31.softmax_scale(), 0.38249888831204115, 1e-15);
  EXPECT_FALSE(v31.fp8);
}

TEST(ModelConfig, BothRopeSpellings) {
  json old_spelling = json::parse(kV32Config), new_spelling = old_spelling;
  json rope = old_spelling["rope_scaling"];
  rope.erase("type");
  rope["rope_type"] = "yarn";
  rope["rope_theta"] = 10000.0;
  new_spelling.erase("rope_scaling");
  new_spelling.erase("rope_theta");
  new_spelling["rope_parameters"] = rope;
  const auto a = ModelConfig::from_json(old_spelling.dump(), "a"), b = ModelConfig::from_json(new_spelling.dump(), "b");
  EXPECT_EQ(json::parse(a.to_json(HfFormat::V32, HfDtype::FP8)), json::parse(b.to_json(HfFormat::V32, HfDtype::FP8)));

  json both = old_spelling;
  both["rope_parameters"] = rope;
  EXPECT_NO_THROW(ModelConfig::from_json(both.dump(), "both"));
  both["rope_parameters"]["factor"] = 32;
  expect_contains(refused(both), "rope_parameters differ");

  json plain = old_spelling;
  plain["rope_scaling"] = nullptr;
  const auto c = ModelConfig::from_json(plain.dump(), "plain");
  EXPECT_FALSE(c.rope.yarn);
  EXPECT_NEAR(c.softmax_scale(), 1 / std::sqrt(192.0), 1e-15);
  EXPECT_TRUE(json::parse(c.to_json(HfFormat::V31, HfDtype::BF16))["rope_scaling"].is_null());
}

// An export has exactly the release's fields and values.
TEST(ModelConfig, WritesTheRelease) {
  const json v32 = json::parse(kV32Config);
  const auto c = ModelConfig::from_json(kV32Config, "config.json");
  EXPECT_EQ(json::parse(c.to_json(HfFormat::V32, HfDtype::FP8)), v32);

  json v31 = v32;
  for (const char* key : {"index_n_heads", "index_head_dim", "index_topk"}) v31.erase(key);
  v31["model_type"] = "deepseek_v3";
  v31["architectures"] = {"DeepseekV3ForCausalLM"};
  v31["auto_map"] = {{"AutoConfig", "configuration_deepseek.DeepseekV3Config"}};
  v31["a_key_of_tomorrow"] = {1, 2};
  const auto d = ModelConfig::from_json(v31.dump(), "config.json");
  EXPECT_EQ(json::parse(d.to_json(HfFormat::V31, HfDtype::FP8)), v31);

  ModelConfig grown = d;  // V3.1 -> V3.2: the indexer comes from elsewhere
  EXPECT_THROW(grown.to_json(HfFormat::V32, HfDtype::FP8), std::invalid_argument);
  grown.indexer = IndexerConfig{};
  json expected = v32;
  expected["a_key_of_tomorrow"] = {1, 2};
  EXPECT_EQ(json::parse(grown.to_json(HfFormat::V32, HfDtype::FP8)), expected);

  json bf16 = json::parse(c.to_json(HfFormat::V32, HfDtype::BF16)), fp32 = json::parse(c.to_json(HfFormat::V32, HfDtype::FP32));
  EXPECT_FALSE(bf16.contains("quantization_config"));
  EXPECT_EQ(bf16["torch_dtype"], "bfloat16");
  EXPECT_EQ(fp32["torch_dtype"], "float32");
  for (const auto* text : {&bf16, &fp32}) {
    const auto again = ModelConfig::from_json(text->dump(), "again");
    EXPECT_FALSE(again.fp8);
    EXPECT_EQ(again.rope.mscale_all_dim, 1.0);
    EXPECT_EQ(again.rms_norm_eps, 1e-6);
  }
}

TEST(ModelConfig, RefusesWhatItCannotBe) {
  const json good = json::parse(kV32Config);
  const std::vector<std::tuple<const char*, json, const char*>> cases{
      {"num_attention_heads", 0, "below 1"},
      {"hidden_size", -128, "below 1"},
      {"hidden_size", 128.5, "not an integer"},
      {"hidden_size", "128", "not an integer"},
      {"hidden_size", 18446744073709551615u, "not an integer"},
      {"vocab_size", int64_t{1} << 40, "over 2^28"},
      {"n_group", 7, "not a multiple of n_group"},
      {"topk_group", 9, "exceeds n_group"},
      {"num_experts_per_tok", 129, "exceeds the 128 experts"},
      {"qk_rope_head_dim", 63, "is odd"},
      {"index_head_dim", 32, "smaller than qk_rope_head_dim"},
      {"index_topk", 0, "below 1"},
      {"tie_word_embeddings", true, "only false"},
      {"q_lora_rank", nullptr, "is null"},
      {"scoring_func", "softmax", "only \"sigmoid\""},
      {"hidden_act", "gelu", "only \"silu\""},
      {"attention_bias", true, "only false"},
      {"topk_method", "greedy", "only \"noaux_tc\""},
      {"moe_layer_freq", 2, "only 1"},
      {"num_key_value_heads", 8, "differs from num_attention_heads = 128"},
      {"model_type", "llama", "only \"deepseek_v3\""},
      {"indexer_rope_interleave", true, "only false"},
      {"first_k_dense_replace", 62, "exceeds num_hidden_layers"},
      {"bos_token_id", 129280, "outside the vocabulary"},
      {"rms_norm_eps", 0, "between 0 and 1"},
      {"norm_topk_prob", 1, "not true or false"},
  };
  for (const auto& [key, value, part] : cases) {
    json bad = good;
    if (std::string(key) == "num_attention_heads") bad.erase("num_key_value_heads");
    bad[key] = value;
    const std::string message = refused(bad);
    expect_contains(message, key);
    expect_contains(message, part);
    bad = good;
    bad.erase(key);
    if (std::string(key) == "hidden_size" || std::string(key) == "index_topk" || std::string(key) == "model_type")
      expect_contains(refused(bad), std::string(key) + " is missing");
  }
  json two = good;
  two["n_group"] = 7;
  two["qk_rope_head_dim"] = 63;
  expect_contains(refused(two), "multiple of n_group");  // all problems at once
  expect_contains(refused(two), "is odd");
  json rope = good;
  rope["rope_scaling"]["type"] = "linear";
  expect_contains(refused(rope), "only \"yarn\"");
  rope["rope_scaling"] = {{"type", "yarn"}};
  expect_contains(refused(rope), "rope_scaling.factor is missing");
  json quant = good;
  quant["quantization_config"]["weight_block_size"] = {64, 64};
  expect_contains(refused(quant), "weight_block_size");
  const auto text = [](const std::string& t) { return refusal([&] { ModelConfig::from_json(t, "config.json"); }); };
  expect_contains(text("{\"hidden_size\": 1, \"hidden_size\": 2}"), "is there twice");
  expect_contains(text("[]"), "does not begin with '{'");
  expect_contains(text("{"), "config.json");
}

// Counts and bytes of the released 671B folders, without a model.
TEST(HfNames, CountsAndBytesOfTheReleases) {
  const auto config = ModelConfig::from_json(kV32Config, "config.json");
  const auto count = [&](HfFormat format) {
    std::map<Dtype, int64_t> tensors;
    uint64_t bytes = 0;
    for (const StoredTensor& t : hf_stored_tensors(config, format, HfDtype::FP8)) {
      ++tensors[t.dtype];
      bytes += tensor_bytes(t.dtype, t.shape);
    }
    return std::pair(tensors, bytes);
  };
  const auto [v31, v31_bytes] = count(HfFormat::V31);
  EXPECT_EQ(v31, (std::map<Dtype, int64_t>{{Dtype::BF16, 316}, {Dtype::F8_E4M3, 45808}, {Dtype::F32, 45867}}));
  EXPECT_EQ(v31_bytes, 688574839360u);
  const auto [v32, v32_bytes] = count(HfFormat::V32);
  EXPECT_EQ(v32, (std::map<Dtype, int64_t>{{Dtype::BF16, 126}, {Dtype::F8_E4M3, 45932}, {Dtype::F32, 46367}}));
  EXPECT_EQ(v32_bytes, 689471107200u);
  EXPECT_EQ(hf_stored_tensors(config, HfFormat::V31, HfDtype::FP8).size(), 91991u);
  EXPECT_EQ(hf_stored_tensors(config, HfFormat::V32, HfDtype::FP8).size(), 92425u);

  int64_t parameters = 0;
  for (const HfTensor& t : hf_tensors(config, HfFormat::V31))
    if (t.layer < 61 || t.layer == kTopLayer) {
      int64_t n = 1;
      for (int64_t d : t.shape) n *= d;
      parameters += n;
    }
  EXPECT_EQ(parameters, 671026419200);  // "671B", router biases included
}

}  // namespace
}  // namespace dsa
