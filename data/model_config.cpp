// Reading: transformers 4 writes `rope_theta` beside `rope_scaling` {"type": "yarn", ..}; transformers 5 writes
// `rope_parameters` {"rope_type": "yarn", "rope_theta": .., ..}. Unknown keys are kept and not looked at, but a key
// that would change the architecture (another activation, router, bias, tied embeddings) is refused.
#include "data/model_config.h"

#include <cmath>
#include <vector>

#include "data/error.h"
#include "data/file.h"
#include "data/strict_json.h"

namespace dsa {
namespace {

using nlohmann::json;

constexpr const char* kSuggestion = "use the config.json of a DeepSeek-V3.1 or V3.2 model";

// Fetches typed values of one object and collects every problem.
class Reader {
 public:
  Reader(const json& object, std::string prefix, std::vector<std::string>& problems)
      : object_(object), prefix_(std::move(prefix)), problems_(problems) {}

  bool has(const char* key) const { return object_.contains(key) && !object_[key].is_null(); }

  void require(const char* key, int64_t& value) {
    if (!has(key)) return problem(key, object_.contains(key) ? "is null, which is not supported" : "is missing");
    optional(key, value);
  }
  void require(const char* key, double& value) {
    if (!has(key)) return problem(key, "is missing");
    optional(key, value);
  }
  void optional(const char* key, int64_t& value) {
    if (!has(key)) return;
    const json& v = object_[key];
    const bool fits = v.is_number_unsigned() ? v.get<uint64_t>() <= INT64_MAX : v.is_number_integer();
    if (!fits) return problem(key, "is " + v.dump() + ", not an integer");
    value = v.get<int64_t>();
  }
  void optional(const char* key, double& value) {
    if (!has(key)) return;
    if (!object_[key].is_number()) return problem(key, "is " + object_[key].dump() + ", not a number");
    value = object_[key].get<double>();
  }
  void optional(const char* key, bool& value) {
    if (!has(key)) return;
    if (!object_[key].is_boolean()) return problem(key, "is " + object_[key].dump() + ", not true or false");
    value = object_[key].get<bool>();
  }
  // Absent or exactly this; everything else is another architecture.
  void only(const char* key, const json& expected) {
    if (has(key) && object_[key] != expected)
      problem(key, "is " + object_[key].dump() + ", only " + expected.dump() + " is supported");
  }
  void problem(const std::string& key, const std::string& text) { problems_.push_back(prefix_ + key + " " + text); }

 private:
  const json& object_;
  std::string prefix_;
  std::vector<std::string>& problems_;
};

[[noreturn]] void refuse(const std::string& what, const std::vector<std::string>& problems) {
  std::string all;
  for (const std::string& problem : problems) all += (all.empty() ? "" : "; ") + problem;
  throw InputError("cannot use " + what, all, kSuggestion);
}

RopeScaling read_rope(const json& root, std::vector<std::string>& problems) {
  RopeScaling rope;
  Reader top(root, "", problems);
  top.optional("rope_theta", rope.theta);
  const auto read_one = [&](const char* key, RopeScaling base) {
    if (!top.has(key)) return base;
    if (!root[key].is_object()) {
      top.problem(key, "is not an object");
      return base;
    }
    Reader in(root[key], std::string(key) + ".", problems);
    json type = in.has("rope_type") ? root[key]["rope_type"] : in.has("type") ? root[key]["type"] : json("default");
    if (in.has("rope_type") && in.has("type") && root[key]["type"] != type)
      in.problem("rope_type", "and type differ");
    in.optional("rope_theta", base.theta);
    base.yarn = type == "yarn";
    if (type != "yarn" && type != "default")
      in.problem("type", "is " + type.dump() + ", only \"yarn\" and \"default\" are supported");
    if (!base.yarn) return base;
    in.require("factor", base.factor);
    in.require("original_max_position_embeddings", base.original_max_position);
    in.optional("beta_fast", base.beta_fast);
    in.optional("beta_slow", base.beta_slow);
    in.optional("mscale", base.mscale);
    in.optional("mscale_all_dim", base.mscale_all_dim);
    return base;
  };
  const RopeScaling old_spelling = read_one("rope_scaling", rope), new_spelling = read_one("rope_parameters", rope);
  if (top.has("rope_scaling") && top.has("rope_parameters") &&
      (old_spelling.yarn != new_spelling.yarn || old_spelling.theta != new_spelling.theta ||
       old_spelling.factor != new_spelling.factor ||
       old_spelling.original_max_position != new_spelling.original_max_position ||
       old_spelling.beta_fast != new_spelling.beta_fast || old_spelling.beta_slow != new_spelling.beta_slow ||
       old_spelling.mscale != new_spelling.mscale || old_spelling.mscale_all_dim != new_spelling.mscale_all_dim))
    top.problem("rope_scaling", "and rope_parameters differ");
  return top.has("rope_parameters") ? new_spelling : old_spelling;
}

void read_quantization(const json& root, ModelConfig& config, std::vector<std::string>& problems) {
  config.fp8 = root.contains("quantization_config") && !root["quantization_config"].is_null();
  if (!config.fp8) return;
  const json& object = root["quantization_config"];
  if (!object.is_object()) {
    problems.push_back("quantization_config is not an object");
    return;
  }
  Reader in(object, "quantization_config.", problems);
  in.only("quant_method", "fp8");
  in.only("fmt", "e4m3");
  in.only("weight_block_size", json::array({128, 128}));
}

}  // namespace

ModelConfig ModelConfig::from_json_file(const std::string& path) {
  return from_json(read_text_file(path, 1 << 20), path);
}

ModelConfig ModelConfig::from_json(const std::string& text, const std::string& what) {
  const json root = parse_json_object(text, what, kSuggestion, 32);
  std::vector<std::string> problems;
  Reader in(root, "", problems);
  ModelConfig c;
  c.raw_json = text;
  in.require("vocab_size", c.vocab_size);
  in.require("hidden_size", c.hidden_size);
  in.require("num_hidden_layers", c.num_hidden_layers);
  in.require("first_k_dense_replace", c.first_k_dense_replace);
  in.require("num_attention_heads", c.num_attention_heads);
  in.require("q_lora_rank", c.q_lora_rank);
  in.require("kv_lora_rank", c.kv_lora_rank);
  in.require("qk_nope_head_dim", c.qk_nope_head_dim);
  in.require("qk_rope_head_dim", c.qk_rope_head_dim);
  in.require("v_head_dim", c.v_head_dim);
  in.require("intermediate_size", c.intermediate_size);
  in.require("moe_intermediate_size", c.moe_intermediate_size);
  in.require("n_routed_experts", c.n_routed_experts);
  in.require("n_shared_experts", c.n_shared_experts);
  in.require("num_experts_per_tok", c.num_experts_per_tok);
  in.require("n_group", c.n_group);
  in.require("topk_group", c.topk_group);
  in.require("routed_scaling_factor", c.routed_scaling_factor);
  in.optional("norm_topk_prob", c.norm_topk_prob);
  in.optional("num_nextn_predict_layers", c.num_nextn_predict_layers);
  in.require("rms_norm_eps", c.rms_norm_eps);
  in.optional("initializer_range", c.initializer_range);
  in.require("max_position_embeddings", c.max_position_embeddings);
  in.optional("bos_token_id", c.bos_token_id);
  in.optional("eos_token_id", c.eos_token_id);
  c.rope = read_rope(root, problems);
  read_quantization(root, c, problems);

  const bool v31 = root.contains("model_type") && root["model_type"] == "deepseek_v3";
  const bool v32 = root.contains("model_type") && root["model_type"] == "deepseek_v32";
  if (!v31 && !v32)
    in.problem("model_type", root.contains("model_type") ? "is " + root["model_type"].dump() +
               ", only \"deepseek_v3\" and \"deepseek_v32\" are supported" : "is missing");
  if (v32) {
    c.indexer.emplace();
    in.require("index_n_heads", c.indexer->heads);
    in.require("index_head_dim", c.indexer->head_dim);
    in.require("index_topk", c.indexer->top_k);
  }
  in.only("tie_word_embeddings", false);
  in.only("attention_bias", false);
  in.only("attention_dropout", 0.0);
  in.only("hidden_act", "silu");
  in.only("scoring_func", "sigmoid");
  in.only("topk_method", "noaux_tc");
  in.only("moe_layer_freq", 1);
  in.only("rope_interleave", true);
  in.only("indexer_rope_interleave", false);
  int64_t kv_heads = c.num_attention_heads;
  in.optional("num_key_value_heads", kv_heads);
  if (kv_heads != c.num_attention_heads)
    in.problem("num_key_value_heads", "= " + std::to_string(kv_heads) + " differs from num_attention_heads = " +
               std::to_string(c.num_attention_heads));
  if (!problems.empty()) refuse(what, problems);
  c.validate(what);
  return c;
}

void ModelConfig::validate(const std::string& what) const {
  std::vector<std::string> problems;
  const auto at_least = [&](const char* key, int64_t value, int64_t low) {
    if (value < low) problems.push_back(std::string(key) + " = " + std::to_string(value) + " is below " + std::to_string(low));
    // Products of two dimensions, in bits, must fit 64 bits.
    if (value > (int64_t{1} << 28)) problems.push_back(std::string(key) + " = " + std::to_string(value) + " is over 2^28");
  };
  const auto demand = [&](bool ok, const std::string& problem) {
    if (!ok) problems.push_back(problem);
  };
  at_least("vocab_size", vocab_size, 1);
  at_least("hidden_size", hidden_size, 1);
  at_least("num_hidden_layers", num_hidden_layers, 1);
  at_least("first_k_dense_replace", first_k_dense_replace, 0);
  at_least("num_attention_heads", num_attention_heads, 1);
  at_least("q_lora_rank", q_lora_rank, 1);
  at_least("kv_lora_rank", kv_lora_rank, 1);
  at_least("qk_nope_head_dim", qk_nope_head_dim, 1);
  at_least("qk_rope_head_dim", qk_rope_head_dim, 2);
  at_least("v_head_dim", v_head_dim, 1);
  at_least("intermediate_size", intermediate_size, 1);
  at_least("moe_intermediate_size", moe_intermediate_size, 1);
  at_least("n_routed_experts", n_routed_experts, 1);
  at_least("n_shared_experts", n_shared_experts, 0);
  at_least("num_experts_per_tok", num_experts_per_tok, 1);
  at_least("n_group", n_group, 1);
  at_least("topk_group", topk_group, 1);
  at_least("num_nextn_predict_layers", num_nextn_predict_layers, 0);
  at_least("max_position_embeddings", max_position_embeddings, 1);
  demand(first_k_dense_replace <= num_hidden_layers,
         "first_k_dense_replace = " + std::to_string(first_k_dense_replace) + " exceeds num_hidden_layers = " +
             std::to_string(num_hidden_layers));
  demand(qk_rope_head_dim % 2 == 0, "qk_rope_head_dim = " + std::to_string(qk_rope_head_dim) + " is odd");
  if (n_group >= 1 && topk_group >= 1 && n_routed_experts >= 1) {
    demand(n_routed_experts % n_group == 0, "n_routed_experts = " + std::to_string(n_routed_experts) +
                                                " is not a multiple of n_group = " + std::to_string(n_group));
    demand(topk_group <= n_group, "topk_group = " + std::to_string(topk_group) + " exceeds n_group = " +
                                      std::to_string(n_group));
    demand(n_group == 1 || n_routed_experts / n_group >= 2,
           "a group of " + std::to_string(n_routed_experts / n_group) + " expert has no two best scores to rank it by");
    demand(num_experts_per_tok <= topk_group * (n_routed_experts / n_group),
           "num_experts_per_tok = " + std::to_string(num_experts_per_tok) + " exceeds the " +
               std::to_string(topk_group * (n_routed_experts / n_group)) + " experts of the groups that are kept");
  }
  demand(std::isfinite(routed_scaling_factor) && routed_scaling_factor > 0, "routed_scaling_factor is not positive");
  demand(rms_norm_eps > 0 && rms_norm_eps < 1, "rms_norm_eps is not between 0 and 1");
  demand(initializer_range >= 0 && std::isfinite(initializer_range), "initializer_range is negative");
  demand(rope.theta > 1 && std::isfinite(rope.theta), "rope_theta is not above 1");
  if (rope.yarn) {
    demand(rope.factor >= 1 && std::isfinite(rope.factor), "rope factor is below 1");
    demand(rope.original_max_position >= 1, "original_max_position_embeddings is below 1");
    demand(rope.beta_fast > 0 && rope.beta_slow > 0 && rope.beta_fast >= rope.beta_slow,
           "beta_fast and beta_slow must be positive, beta_fast the larger one");
    demand(rope.mscale >= 0 && rope.mscale_all_dim >= 0, "mscale is negative");
    // cos and sin would carry a factor of their own, which no released model has.
    demand(rope.mscale == rope.mscale_all_dim, "mscale and mscale_all_dim differ, which is not supported");
  }
  if (indexer) {
    at_least("index_n_heads", indexer->heads, 1);
    at_least("index_head_dim", indexer->head_dim, 1);
    at_least("index_topk", indexer->top_k, 1);
    demand(indexer->head_dim >= qk_rope_head_dim, "index_head_dim = " + std::to_string(indexer->head_dim) +
                                                      " is smaller than qk_rope_head_dim = " +
                                                      std::to_string(qk_rope_head_dim));
  }
  for (const auto& [key, id] : {std::pair{"bos_token_id", bos_token_id}, std::pair{"eos_token_id", eos_token_id}})
    demand(id >= 0 && id < vocab_size, std::string(key) + " = " + std::to_string(id) + " is outside the vocabulary of " +
                                           std::to_string(vocab_size));
  if (!problems.empty()) refuse(what, problems);
}

std::string ModelConfig::to_json(HfFormat format, HfDtype dtype) const {
  json j = parse_json_object(raw_json, "the source config.json", kSuggestion, 32);
  j["vocab_size"] = vocab_size;
  j["hidden_size"] = hidden_size;
  j["num_hidden_layers"] = num_hidden_layers;
  j["first_k_dense_replace"] = first_k_dense_replace;
  j["num_attention_heads"] = num_attention_heads;
  j["num_key_value_heads"] = num_attention_heads;
  j["q_lora_rank"] = q_lora_rank;
  j["kv_lora_rank"] = kv_lora_rank;
  j["qk_nope_head_dim"] = qk_nope_head_dim;
  j["qk_rope_head_dim"] = qk_rope_head_dim;
  j["v_head_dim"] = v_head_dim;
  j["intermediate_size"] = intermediate_size;
  j["moe_intermediate_size"] = moe_intermediate_size;
  j["n_routed_experts"] = n_routed_experts;
  j["n_shared_experts"] = n_shared_experts;
  j["num_experts_per_tok"] = num_experts_per_tok;
  j["n_group"] = n_group;
  j["topk_group"] = topk_group;
  j["routed_scaling_factor"] = routed_scaling_factor;
  j["norm_topk_prob"] = norm_topk_prob;
  j["num_nextn_predict_layers"] = num_nextn_predict_layers;
  j["rms_norm_eps"] = rms_norm_eps;
  j["initializer_range"] = initializer_range;
  j["max_position_embeddings"] = max_position_embeddings;
  j["bos_token_id"] = bos_token_id;
  j["eos_token_id"] = eos_token_id;

  // Whole numbers are written as the releases have them: 10000, not 10000.0.
  const auto number = [](double v) { return v == std::floor(v) && std::fabs(v) < 1e15 ? json(static_cast<int64_t>(v)) : json(v); };
  j.erase("rope_parameters");
  j["rope_theta"] = number(rope.theta);
  j["rope_scaling"] = nullptr;
  if (rope.yarn)
    j["rope_scaling"] = {{"type", "yarn"},
                         {"factor", number(rope.factor)},
                         {"original_max_position_embeddings", rope.original_max_position},
                         {"beta_fast", number(rope.beta_fast)},
                         {"beta_slow", number(rope.beta_slow)},
                         {"mscale", rope.mscale},
                         {"mscale_all_dim", rope.mscale_all_dim}};

  const bool v32 = format == HfFormat::V32;
  j["model_type"] = v32 ? "deepseek_v32" : "deepseek_v3";
  j["architectures"] = json::array({v32 ? "DeepseekV32ForCausalLM" : "DeepseekV3ForCausalLM"});
  if (v32) {
    if (!indexer) throw std::invalid_argument("the V3.2 format needs an indexer in the config");
    j.erase("auto_map");  // names V3.1's own Python files
    j["index_n_heads"] = indexer->heads;
    j["index_head_dim"] = indexer->head_dim;
    j["index_topk"] = indexer->top_k;
  } else {
    for (const char* key : {"index_n_heads", "index_head_dim", "index_topk"}) j.erase(key);
  }
  j.erase("quantization_config");
  if (dtype == HfDtype::FP8)
    j["quantization_config"] = {{"activation_scheme", "dynamic"},
                                {"fmt", "e4m3"},
                                {"quant_method", "fp8"},
                                {"scale_fmt", "ue8m0"},
                                {"weight_block_size", {128, 128}}};
  j.erase("dtype");  // transformers 5's spelling of torch_dtype
  j["torch_dtype"] = dtype == HfDtype::FP32 ? "float32" : "bfloat16";

  const json fixed = {{"attention_bias", false}, {"attention_dropout", 0.0}, {"ep_size", 1}, {"hidden_act", "silu"},
                      {"moe_layer_freq", 1}, {"scoring_func", "sigmoid"}, {"tie_word_embeddings", false},
                      {"topk_method", "noaux_tc"}, {"transformers_version", "4.44.2"}, {"use_cache", true}};
  for (const auto& item : fixed.items())
    if (!j.contains(item.key())) j[item.key()] = item.value();
  return j.dump(2) + "\n";
}

double ModelConfig::softmax_scale() const {
  const double m = rope.yarn && rope.factor > 1 ? 0.1 * rope.mscale_all_dim * std::log(rope.factor) + 1.0 : 1.0;
  return m * m / std::sqrt(static_cast<double>(qk_head_dim()));
}

}  // namespace dsa
