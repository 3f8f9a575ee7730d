// Writes a HuggingFace model folder as a stream: tensors in any order, in pieces of rows, never a whole layer in
// memory. Everything is built in `<folder>.tmp-<pid>` and renamed at commit(): config.json and the index come last.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "data/hf_names.h"
#include "data/safetensors.h"

namespace dsa {

struct HfShard {
  std::string file;  // model-00001-of-000163.safetensors
  std::vector<StoredTensor> tensors;
};

// Tensors in reading order; a layer stays in one shard where it fits, a weight always with its scale.
std::vector<HfShard> plan_hf_shards(const ModelConfig& config, HfFormat format, HfDtype dtype, uint64_t max_shard_bytes);

constexpr uint64_t kDefaultShardBytes = 4300000000;  // about what the releases have

class HfFolderWriter {
 public:
  // Refuses an existing folder that is not empty.
  HfFolderWriter(const std::string& folder, const ModelConfig& config, HfFormat format, HfDtype dtype,
                 uint64_t max_shard_bytes = kDefaultShardBytes);
  ~HfFolderWriter();  // without commit(): removes what was built
  HfFolderWriter(const HfFolderWriter&) = delete;
  HfFolderWriter& operator=(const HfFolderWriter&) = delete;

  const std::vector<HfTensor>& tensors() const { return tensors_; }  // logical; those with duplicate_of write themselves
  const StoredTensor& stored(const std::string& name) const;         // planned dtype and shape (scales too)

  // rows[nrows, cols] float32 at row0; a tensor [n] is one row. Rounds or quantises as planned. An FP8 piece
  // starts at a multiple of 128 rows and is a multiple of 128 rows long unless it is the last.
  void write(const std::string& name, const float* rows, int64_t row0, int64_t nrows);

  // Stored bytes copied from a folder that has this tensor (or scale) in the planned dtype.
  void write_raw(const std::string& name, uint64_t offset, const void* bytes, uint64_t n);

  // tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json, where present.
  void copy_tokenizer_files(const std::string& source_folder);

  uint64_t total_bytes() const { return total_bytes_; }      // of all tensors, for progress
  uint64_t written_bytes() const { return written_bytes_; }

  void commit();  // throws unless every tensor is complete

 private:
  struct Target {
    StoredTensor tensor;
    size_t shard;
  };
  void put(const std::string& name, uint64_t offset, const void* bytes, uint64_t n);

  std::string folder_, staging_;
  ModelConfig config_;
  HfFormat format_;
  HfDtype dtype_;
  std::vector<HfTensor> tensors_;
  std::unordered_map<std::string, const HfTensor*> logical_;
  std::unordered_map<std::string, std::vector<std::string>> copies_;  // stored name -> its duplicates
  std::vector<HfShard> shards_;
  std::vector<std::unique_ptr<SafetensorsWriter>> writers_;  // open from the first byte to the last
  std::vector<char> finished_;
  std::unordered_map<std::string, Target> targets_;
  uint64_t total_bytes_ = 0, written_bytes_ = 0;
  bool committed_ = false;
};

}  // namespace dsa
