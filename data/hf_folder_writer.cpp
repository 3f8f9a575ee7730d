#include "data/hf_folder_writer.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include "data/error.h"
#include "data/float_formats.h"
#include "data/fp8_block.h"
#include "data/strict_json.h"

namespace dsa {
namespace fs = std::filesystem;
namespace {

struct Unit {  // a weight and its scale: never parted
  std::vector<StoredTensor> tensors;
  uint64_t bytes = 0;
  int64_t layer = 0;
};

std::vector<Unit> units(const ModelConfig& config, HfFormat format, HfDtype dtype) {
  std::vector<Unit> all;
  const std::vector<StoredTensor> stored = hf_stored_tensors(config, format, dtype);
  size_t next = 0;
  for (const HfTensor& tensor : hf_tensors(config, format)) {
    Unit unit;
    unit.layer = tensor.layer;
    const size_t n = stored[next].dtype == Dtype::F8_E4M3 ? 2 : 1;
    for (size_t i = 0; i < n; ++i) {
      unit.bytes += tensor_bytes(stored[next].dtype, stored[next].shape);
      unit.tensors.push_back(stored[next++]);
    }
    all.push_back(std::move(unit));
  }
  return all;
}

}  // namespace

std::vector<HfShard> plan_hf_shards(const ModelConfig& config, HfFormat format, HfDtype dtype, uint64_t max_shard_bytes) {
  const std::vector<Unit> all = units(config, format, dtype);
  std::vector<HfShard> shards;
  uint64_t used = 0;
  const auto open_shard = [&] {
    shards.emplace_back();
    used = 0;
  };
  open_shard();
  for (size_t begin = 0; begin < all.size();) {
    size_t end = begin;
    uint64_t layer_bytes = 0;
    for (; end < all.size() && all[end].layer == all[begin].layer; ++end) layer_bytes += all[end].bytes;
    if (used > 0 && used + layer_bytes > max_shard_bytes) open_shard();
    for (; begin < end; ++begin) {
      if (used > 0 && used + all[begin].bytes > max_shard_bytes) open_shard();
      used += all[begin].bytes;
      for (const StoredTensor& tensor : all[begin].tensors) shards.back().tensors.push_back(tensor);
    }
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    char file[64];
    std::snprintf(file, sizeof file, "model-%05zu-of-%06zu.safetensors", i + 1, shards.size());
    shards[i].file = file;
  }
  return shards;
}

HfFolderWriter::HfFolderWriter(const std::string& folder, const ModelConfig& config, HfFormat format, HfDtype dtype,
                               uint64_t max_shard_bytes)
    : folder_(fs::path(folder).lexically_normal().string()), config_(config), format_(format), dtype_(dtype),
      tensors_(hf_tensors(config, format)), shards_(plan_hf_shards(config, format, dtype, max_shard_bytes)) {
  if (folder_.size() > 1 && folder_.back() == '/') folder_.pop_back();
  if (path_exists(folder_) && !(fs::is_directory(folder_) && fs::is_empty(folder_)))
    throw InputError("cannot write the model folder " + folder_, "it exists already and is not empty",
                     "choose another name or remove that folder first");
  staging_ = folder_ + ".tmp-" + std::to_string(::getpid());
  std::error_code error;
  const fs::path parent = fs::path(folder_).parent_path();
  if (!parent.empty()) fs::create_directories(parent, error);
  if (error || !fs::create_directory(staging_, error))
    throw InputError("cannot create " + staging_, error ? error.message() : "it exists already",
                     "check that the folder above it is writable and remove what an earlier run left");

  for (const HfTensor& tensor : tensors_) {
    logical_[tensor.name] = &tensor;
    if (!tensor.duplicate_of.empty()) copies_[tensor.duplicate_of].push_back(tensor.name);
  }
  writers_.resize(shards_.size());
  finished_.assign(shards_.size(), 0);
  for (size_t i = 0; i < shards_.size(); ++i)
    for (const StoredTensor& tensor : shards_[i].tensors) {
      targets_[tensor.name] = {tensor, i};
      total_bytes_ += tensor_bytes(tensor.dtype, tensor.shape);
    }
}

HfFolderWriter::~HfFolderWriter() {
  if (committed_) return;
  writers_.clear();
  std::error_code ignored;
  fs::remove_all(staging_, ignored);
}

const StoredTensor& HfFolderWriter::stored(const std::string& name) const {
  const auto it = targets_.find(name);
  if (it == targets_.end()) throw std::invalid_argument("tensor " + name + " is not part of the folder " + folder_);
  return it->second.tensor;
}

void HfFolderWriter::put(const std::string& name, uint64_t offset, const void* bytes, uint64_t n) {
  const size_t shard = targets_.at(name).shard;
  if (finished_[shard]) throw std::logic_error("tensor " + name + " was written already");
  auto& writer = writers_[shard];
  if (!writer) {
    std::vector<TensorInfo> infos;
    for (const StoredTensor& t : shards_[shard].tensors) infos.push_back({t.name, t.dtype, t.shape});
    writer = std::make_unique<SafetensorsWriter>(staging_ + "/" + shards_[shard].file, infos,
                                                 std::map<std::string, std::string>{{"format", "pt"}});
  }
  writer->write(name, offset, bytes, n);
  written_bytes_ += n;
  if (writer->complete()) {  // a full shard leaves memory and the table of open files at once
    writer->commit();
    writer.reset();
    finished_[shard] = 1;
  }
}

void HfFolderWriter::write_raw(const std::string& name, uint64_t offset, const void* bytes, uint64_t n) {
  stored(name);
  const auto logical = logical_.find(name);
  if (logical != logical_.end() && !logical->second->duplicate_of.empty())
    throw std::logic_error("tensor " + name + " is written together with " + logical->second->duplicate_of);
  put(name, offset, bytes, n);
  const auto copies = copies_.find(name);
  if (copies != copies_.end())
    for (const std::string& copy : copies->second) put(copy, offset, bytes, n);
}

void HfFolderWriter::write(const std::string& name, const float* rows, int64_t row0, int64_t nrows) {
  const StoredTensor& tensor = stored(name);
  const int64_t height = tensor.shape.size() == 2 ? tensor.shape[0] : 1, width = tensor.shape.back();
  if (row0 < 0 || nrows <= 0 || row0 > height - nrows)
    throw std::out_of_range("rows " + std::to_string(row0) + "+" + std::to_string(nrows) + " of tensor " + name);
  const uint64_t first = static_cast<uint64_t>(row0 * width), n = static_cast<uint64_t>(nrows * width);
  switch (tensor.dtype) {
    case Dtype::F32:
      return write_raw(name, first * 4, rows, n * 4);
    case Dtype::BF16: {
      std::vector<uint16_t> values(n);
      std::transform(rows, rows + n, values.begin(), float_to_bf16);
      return write_raw(name, first * 2, values.data(), n * 2);
    }
    case Dtype::F8_E4M3: {
      if (row0 % kFp8Block != 0 || (nrows % kFp8Block != 0 && row0 + nrows != height))
        throw std::invalid_argument("rows " + std::to_string(row0) + "+" + std::to_string(nrows) + " of FP8 tensor " +
                                    name + " are not whole blocks of 128");
      std::vector<uint8_t> codes(n);
      std::vector<float> scales(static_cast<size_t>(fp8_blocks(nrows) * fp8_blocks(width)));
      fp8_quantize(rows, nrows, width, codes.data(), scales.data());
      write_raw(name, first, codes.data(), n);
      return write_raw(hf_scale_name(name), static_cast<uint64_t>(row0 / kFp8Block * fp8_blocks(width)) * 4,
                       scales.data(), scales.size() * 4);
    }
    default:
      throw std::logic_error("no writer for dtype " + dsa::name(tensor.dtype));
  }
}

void HfFolderWriter::copy_tokenizer_files(const std::string& source_folder) {
  for (const char* file : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"})
    if (path_exists(source_folder + "/" + file))
      write_text_file(staging_ + "/" + file, read_text_file(source_folder + "/" + file, 256 << 20), true);
}

void HfFolderWriter::commit() {
  for (size_t i = 0; i < shards_.size(); ++i)
    if (!finished_[i]) throw std::logic_error("shard " + shards_[i].file + " of " + folder_ + " is not complete");
  write_text_file(staging_ + "/config.json", config_.to_json(format_, dtype_), false);
  nlohmann::json index = {{"metadata", {{"total_size", total_bytes_}}}, {"weight_map", nlohmann::json::object()}};
  for (const HfShard& shard : shards_)
    for (const StoredTensor& tensor : shard.tensors) index["weight_map"][tensor.name] = shard.file;
  write_text_file(staging_ + "/model.safetensors.index.json", index.dump(2) + "\n", false);
  sync_directory(staging_);
  // rename() replaces an empty folder and fails on one that was filled meanwhile.
  if (std::rename(staging_.c_str(), folder_.c_str()) != 0)
    throw InputError("cannot write the model folder " + folder_, std::strerror(errno),
                     "choose another name or remove that folder first");
  committed_ = true;
  const std::string parent = fs::path(folder_).parent_path().string();
  sync_directory(parent.empty() ? "." : parent);
}

}  // namespace dsa
