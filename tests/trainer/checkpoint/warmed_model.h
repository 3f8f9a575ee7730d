// The golden FP8 V3.1 folder plus an indexer of seeded numbers, as a warm-up leaves it: a native checkpoint that holds
// the indexer alone and refers to the folder for the rest.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <random>

#include "data/hf_folder.h"
#include "data/hf_names.h"
#include "parallel/local_communicator.h"
#include "synthetic_state.h"
#include "trainer/checkpoint/save.h"

namespace dsa::test {

inline const std::string kFp8 = std::string(DSA_GOLDEN) + "/hf_v31_tiny_fp8";

inline ModelConfig config_with_indexer(const std::string& folder) {
  ModelConfig config = HfFolder(folder).config();
  config.indexer = IndexerConfig{4, 16, 16};
  return config;
}

inline bool is_indexer(const std::string& name) { return name.find(".indexer.") != std::string::npos; }

inline std::vector<float> indexer_values(const HfTensor& tensor) {
  std::mt19937 rng(static_cast<unsigned>(tensor.layer * 131 + tensor.name.size()));
  std::normal_distribution<float> normal(0.0f, 0.1f);
  std::vector<float> values(numel(tensor.shape));
  for (float& v : values) v = normal(rng);
  return values;
}

/// Saves step 5 into `run`; `base` is the folder referred to. Returns the checkpoint's path.
inline std::string save_warmed(const std::string& run, const std::string& base) {
  const ModelConfig config = config_with_indexer(base);
  std::vector<std::vector<float>> memory;
  std::vector<StateShard> shards;
  for (const HfTensor& tensor : hf_tensors(config, HfFormat::V32))
    if (is_indexer(tensor.name)) {
      memory.push_back(indexer_values(tensor));
      shards.push_back({Role::PARAM, whole(tensor.name, tensor.shape), Dtype::F32, memory.back().data()});
    }
  TrainingState state = synthetic_facts(5);
  state.stage = "WARMUP";
  state.model_json = config.to_json(HfFormat::V32, HfDtype::FP32);
  state.base_path = base;
  state.base_digest = HfFolder(base).digest();
  LocalCommunicator world;
  const SaveResult saved = save_checkpoint(run, state, shards, world, 2);
  EXPECT_TRUE(saved.committed) << saved.error;
  return saved.path;
}

}  // namespace dsa::test
