// The tensors of a HuggingFace DeepSeek-V3.1 / V3.2 folder: names, shapes [out, in], stored types.
//   V3.1: norms BF16, router bias F32; V3.2: norms F32. FP8 matrices carry `<name>_scale_inv`,
//   F32 [ceil(out/128), ceil(in/128)], the multiplier of each 128 x 128 block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/dtype.h"
#include "data/model_config.h"

namespace dsa {

struct HfTensor {
  enum class Kind {
    LINEAR_FP8,    // a matrix that releases store as FP8 blocks
    MATRIX_BF16,   // embedding, head, router, eh_proj, weights_proj
    NORM,          // RMSNorm weight
    ROUTER_BIAS,   // e_score_correction_bias, F32 always
    INDEXER_NORM,  // k_norm weight and bias, F32 always
  };
  std::string name;
  std::vector<int64_t> shape;
  Kind kind;
  int64_t layer;             // -1: embedding; num_hidden_layers.. : MTP; kTopLayer: model.norm, lm_head
  std::string duplicate_of;  // MTP's embed_tokens and shared_head.head: the tensor they repeat; else empty
};
constexpr int64_t kTopLayer = 1 << 30;

struct StoredTensor {
  std::string name;
  Dtype dtype;
  std::vector<int64_t> shape;
};

// Logical weights, in the order embedding, layers, model.norm, lm_head, MTP layers. No scales.
// HfFormat::V32 needs config.indexer.
std::vector<HfTensor> hf_tensors(const ModelConfig& config, HfFormat format);

Dtype hf_stored_dtype(HfTensor::Kind kind, HfFormat format, HfDtype dtype);

// As files hold them: each FP8 weight is followed by its scale.
std::vector<StoredTensor> hf_stored_tensors(const ModelConfig& config, HfFormat format, HfDtype dtype);

std::string hf_scale_name(const std::string& weight_name);  // "<name>_scale_inv"

}  // namespace dsa
