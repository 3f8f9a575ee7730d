// A HuggingFace model folder, read in place: config.json and either model.safetensors or shards with
// model.safetensors.index.json. Opening validates every header and the index in both directions (and every FP8
// scale), but holds no data; a rank then reads just the slices it needs. `total_size` is never looked at.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "data/model_config.h"
#include "data/safetensors.h"

namespace dsa {

class HfFolder {
 public:
  explicit HfFolder(const std::string& path);  // throws InputError

  const std::string& path() const { return path_; }
  const ModelConfig& config() const { return config_; }
  std::vector<std::string> names() const;  // every stored tensor, scales too, ascending
  size_t shard_count() const { return shards_.size(); }

  bool has(const std::string& name) const;
  const std::vector<int64_t>& shape(const std::string& name) const;
  Dtype stored_dtype(const std::string& name) const;
  uint64_t raw_bytes(const std::string& name) const;

  // out[rows, cols] = tensor[row0 : row0+rows, col0 : col0+cols] as float32; a tensor [n] is read as [1, n].
  // FP8 (with its scale, wherever it lies), BF16, F16, F32. Extra memory: one block row of the slice.
  void read_rows(const std::string& name, int64_t row0, int64_t rows, int64_t col0, int64_t cols, float* out) const;

  // The stored bytes, undecoded.
  void read_raw(const std::string& name, uint64_t offset, uint64_t bytes, void* out) const;

  // Throws one InputError that lists missing tensors, unexpected tensors, wrong shapes and dtypes. The indexer's tensors
  // are expected when this folder is V3.2, and are not when it is V3.1, whatever config.indexer says.
  void check_against(const ModelConfig& config) const;

  // XXH3-128 (hex) of config.json, the index, and each shard's name, header, size and a sample of
  // its data.
  std::string digest() const;

 private:
  struct Place {
    const SafetensorsFile* file;
    const TensorEntry* entry;
  };
  const Place& place(const std::string& name) const;

  std::string path_, config_text_, index_text_;
  ModelConfig config_;
  std::map<std::string, std::unique_ptr<SafetensorsFile>> shards_;  // by file name
  std::unordered_map<std::string, Place> places_;
};

}  // namespace dsa
