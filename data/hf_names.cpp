#include "data/hf_names.h"

#include <stdexcept>

#include "data/fp8_block.h"

namespace dsa {
namespace {

using Kind = HfTensor::Kind;

class Table {
 public:
  Table(const ModelConfig& config, HfFormat format) : c_(config), with_indexer_(format == HfFormat::V32) {
    if (with_indexer_ && !c_.indexer) throw std::invalid_argument("the V3.2 format needs an indexer in the config");
  }

  std::vector<HfTensor> build() {
    add(-1, "model.embed_tokens.weight", {c_.vocab_size, c_.hidden_size}, Kind::MATRIX_BF16);
    for (int64_t layer = 0; layer < c_.num_hidden_layers; ++layer) decoder_layer(layer);
    add(kTopLayer, "model.norm.weight", {c_.hidden_size}, Kind::NORM);
    add(kTopLayer, "lm_head.weight", {c_.vocab_size, c_.hidden_size}, Kind::MATRIX_BF16);
    for (int64_t layer = c_.num_hidden_layers; layer < c_.total_layers(); ++layer) mtp_layer(layer);
    return std::move(tensors_);
  }

 private:
  void add(int64_t layer, std::string name, std::vector<int64_t> shape, Kind kind, std::string duplicate_of = "") {
    tensors_.push_back({std::move(name), std::move(shape), kind, layer, std::move(duplicate_of)});
  }

  void mtp_layer(int64_t layer) {
    const std::string p = prefix(layer);
    const int64_t H = c_.hidden_size;
    add(layer, p + "embed_tokens.weight", {c_.vocab_size, H}, Kind::MATRIX_BF16, "model.embed_tokens.weight");
    add(layer, p + "enorm.weight", {H}, Kind::NORM);
    add(layer, p + "hnorm.weight", {H}, Kind::NORM);
    add(layer, p + "eh_proj.weight", {H, 2 * H}, Kind::MATRIX_BF16);
    decoder_layer(layer);
    add(layer, p + "shared_head.norm.weight", {H}, Kind::NORM);
    add(layer, p + "shared_head.head.weight", {c_.vocab_size, H}, Kind::MATRIX_BF16, "lm_head.weight");
  }

  void decoder_layer(int64_t layer) {
    const std::string p = prefix(layer), attn = p + "self_attn.", mlp = p + "mlp.";
    const int64_t H = c_.hidden_size, heads = c_.num_attention_heads;
    add(layer, p + "input_layernorm.weight", {H}, Kind::NORM);
    add(layer, attn + "q_a_proj.weight", {c_.q_lora_rank, H}, Kind::LINEAR_FP8);
    add(layer, attn + "q_a_layernorm.weight", {c_.q_lora_rank}, Kind::NORM);
    add(layer, attn + "q_b_proj.weight", {heads * c_.qk_head_dim(), c_.q_lora_rank}, Kind::LINEAR_FP8);
    add(layer, attn + "kv_a_proj_with_mqa.weight", {c_.kv_lora_rank + c_.qk_rope_head_dim, H}, Kind::LINEAR_FP8);
    add(layer, attn + "kv_a_layernorm.weight", {c_.kv_lora_rank}, Kind::NORM);
    add(layer, attn + "kv_b_proj.weight", {heads * (c_.qk_nope_head_dim + c_.v_head_dim), c_.kv_lora_rank},
        Kind::LINEAR_FP8);
    add(layer, attn + "o_proj.weight", {H, heads * c_.v_head_dim}, Kind::LINEAR_FP8);
    if (with_indexer_) {
      const std::string idx = attn + "indexer.";
      const IndexerConfig& i = *c_.indexer;
      add(layer, idx + "wq_b.weight", {i.heads * i.head_dim, c_.q_lora_rank}, Kind::LINEAR_FP8);
      add(layer, idx + "wk.weight", {i.head_dim, H}, Kind::LINEAR_FP8);
      add(layer, idx + "k_norm.weight", {i.head_dim}, Kind::INDEXER_NORM);
      add(layer, idx + "k_norm.bias", {i.head_dim}, Kind::INDEXER_NORM);
      add(layer, idx + "weights_proj.weight", {i.heads, H}, Kind::MATRIX_BF16);
    }
    add(layer, p + "post_attention_layernorm.weight", {H}, Kind::NORM);
    if (!c_.is_moe(layer)) return swiglu(layer, mlp, c_.intermediate_size);
    add(layer, mlp + "gate.weight", {c_.n_routed_experts, H}, Kind::MATRIX_BF16);
    add(layer, mlp + "gate.e_score_correction_bias", {c_.n_routed_experts}, Kind::ROUTER_BIAS);
    for (int64_t e = 0; e < c_.n_routed_experts; ++e)
      swiglu(layer, mlp + "experts." + std::to_string(e) + ".", c_.moe_intermediate_size);
    if (c_.n_shared_experts > 0)
      swiglu(layer, mlp + "shared_experts.", c_.n_shared_experts * c_.moe_intermediate_size);
  }

  void swiglu(int64_t layer, const std::string& p, int64_t inner) {
    add(layer, p + "gate_proj.weight", {inner, c_.hidden_size}, Kind::LINEAR_FP8);
    add(layer, p + "up_proj.weight", {inner, c_.hidden_size}, Kind::LINEAR_FP8);
    add(layer, p + "down_proj.weight", {c_.hidden_size, inner}, Kind::LINEAR_FP8);
  }

  static std::string prefix(int64_t layer) { return "model.layers." + std::to_string(layer) + "."; }

  const ModelConfig& c_;
  bool with_indexer_;
  std::vector<HfTensor> tensors_;
};

}  // namespace

std::vector<HfTensor> hf_tensors(const ModelConfig& config, HfFormat format) { return Table(config, format).build(); }

Dtype hf_stored_dtype(Kind kind, HfFormat format, HfDtype dtype) {
  if (dtype == HfDtype::FP32) return Dtype::F32;
  switch (kind) {
    case Kind::LINEAR_FP8: return dtype == HfDtype::FP8 ? Dtype::F8_E4M3 : Dtype::BF16;
    case Kind::MATRIX_BF16: return Dtype::BF16;
    case Kind::NORM: return format == HfFormat::V32 ? Dtype::F32 : Dtype::BF16;
    case Kind::ROUTER_BIAS:
    case Kind::INDEXER_NORM: return Dtype::F32;
  }
  throw std::invalid_argument("unknown kind of tensor");
}

std::vector<StoredTensor> hf_stored_tensors(const ModelConfig& config, HfFormat format, HfDtype dtype) {
  std::vector<StoredTensor> stored;
  for (const HfTensor& tensor : hf_tensors(config, format)) {
    const Dtype d = hf_stored_dtype(tensor.kind, format, dtype);
    stored.push_back({tensor.name, d, tensor.shape});
    if (d == Dtype::F8_E4M3)
      stored.push_back({hf_scale_name(tensor.name), Dtype::F32, {fp8_blocks(tensor.shape[0]), fp8_blocks(tensor.shape[1])}});
  }
  return stored;
}

std::string hf_scale_name(const std::string& weight_name) { return weight_name + "_scale_inv"; }

}  // namespace dsa
