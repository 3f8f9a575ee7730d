// The architecture as HuggingFace's config.json describes it (DeepSeek-V3.1 or V3.2), and back.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace dsa {

enum class HfFormat { V31, V32 };         // deepseek_v3 without indexer | deepseek_v32 with it
enum class HfDtype { FP8, BF16, FP32 };   // how the matrices of a folder are stored

// YaRN (arXiv 2309.00071) as the two `rope_scaling` / `rope_parameters` spellings give it; yarn false = plain RoPE.
struct RopeScaling {
  bool yarn = false;
  double theta = 10000.0;
  double factor = 1.0;
  int64_t original_max_position = 4096;
  double beta_fast = 32.0, beta_slow = 1.0;
  double mscale = 1.0, mscale_all_dim = 0.0;  // transformers' defaults
};

struct IndexerConfig {
  int64_t heads = 64, head_dim = 128, top_k = 2048;
};

struct ModelConfig {
  int64_t vocab_size = 0, hidden_size = 0, num_hidden_layers = 0, first_k_dense_replace = 0;
  int64_t num_attention_heads = 0, q_lora_rank = 0, kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0, qk_rope_head_dim = 0, v_head_dim = 0;
  int64_t intermediate_size = 0, moe_intermediate_size = 0;
  int64_t n_routed_experts = 0, n_shared_experts = 0, num_experts_per_tok = 0, n_group = 1, topk_group = 1;
  double routed_scaling_factor = 1.0;
  bool norm_topk_prob = true;
  int64_t num_nextn_predict_layers = 0;  // MTP layers, stored behind the others
  double rms_norm_eps = 1e-6;
  double initializer_range = 0.02;
  RopeScaling rope;
  int64_t max_position_embeddings = 0;
  std::optional<IndexerConfig> indexer;  // nullopt: V3.1
  int64_t bos_token_id = 0, eos_token_id = 1;
  bool fp8 = false;               // has a quantization_config
  std::string raw_json = "{}";    // the file's text: unknown keys survive an export

  // Throws InputError: not JSON, a field missing or of the wrong type, or what validate() refuses.
  static ModelConfig from_json_file(const std::string& path);
  static ModelConfig from_json(const std::string& text, const std::string& what);

  // Illegal or unsupported values; `what` opens the message (a path). All problems in one error.
  void validate(const std::string& what) const;

  // config.json of a release: `rope_scaling` spelling, architectures, quantization_config with FP8 only.
  // V32 needs `indexer`; V31 leaves it out. auto_map is kept for V31 if the source had one.
  std::string to_json(HfFormat format, HfDtype dtype) const;

  HfFormat format() const { return indexer ? HfFormat::V32 : HfFormat::V31; }
  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  // qk_head_dim^-0.5 * m^2, m = 0.1 * mscale_all_dim * ln(factor) + 1 with YaRN and factor > 1, else m = 1.
  double softmax_scale() const;
  int64_t total_layers() const { return num_hidden_layers + num_nextn_predict_layers; }  // with MTP
  bool is_moe(int64_t layer) const { return layer >= first_k_dense_replace; }            // MTP layers always are
};

}  // namespace dsa
