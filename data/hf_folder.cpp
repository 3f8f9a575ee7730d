#include "data/hf_folder.h"

#include <algorithm>
#include <filesystem>
#include <stdexcept>

#include "data/digest.h"
#include "data/error.h"
#include "data/float_formats.h"
#include "data/fp8_block.h"
#include "data/hf_names.h"
#include "data/strict_json.h"

namespace dsa {
namespace {

constexpr uint64_t kMaxIndexBytes = 256 << 20;
constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr const char* kDownloadAgain = "download or write the folder again";

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// At most eight names, then the count: a wrong folder may lack 90,000 tensors.
std::string some(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < names.size() && i < 8; ++i) text += (i ? ", " : "") + names[i];
  if (names.size() > 8) text += ", ... (" + std::to_string(names.size()) + " in all)";
  return text;
}

bool is_scale(const std::string& name) { return name.size() > 10 && name.ends_with("_scale_inv"); }

bool is_readable(Dtype dtype) {
  return dtype == Dtype::F8_E4M3 || dtype == Dtype::BF16 || dtype == Dtype::F16 || dtype == Dtype::F32;
}

using WeightMap = std::map<std::string, std::string>;  // tensor -> shard

WeightMap parse_index(const std::string& text, const std::string& path) {
  const nlohmann::json root = parse_json_object(text, path, kDownloadAgain, 8);
  const auto refuse = [&](const std::string& why) { return InputError("cannot read " + path, why, kDownloadAgain); };
  if (!root.contains("weight_map") || !root["weight_map"].is_object()) throw refuse("it has no weight_map");
  WeightMap map;
  for (const auto& item : root["weight_map"].items()) {
    if (!item.value().is_string()) throw refuse("weight_map gives no file name for " + item.key());
    const std::string file = item.value().get<std::string>();
    if (file.find('/') != std::string::npos || file.find('\\') != std::string::npos || !file.ends_with(".safetensors"))
      throw refuse("weight_map names \"" + file + "\", which is not a .safetensors file of this folder");
    map[item.key()] = file;
  }
  return map;
}

void decode(Dtype dtype, const std::vector<char>& bytes, int64_t n, float* out) {
  const auto u16 = [&](int64_t i) {
    uint16_t v;
    std::memcpy(&v, bytes.data() + 2 * i, 2);
    return v;
  };
  if (dtype == Dtype::F32) std::memcpy(out, bytes.data(), static_cast<size_t>(n) * 4);
  if (dtype == Dtype::BF16)
    for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(u16(i));
  if (dtype == Dtype::F16)
    for (int64_t i = 0; i < n; ++i) out[i] = f16_to_float(u16(i));
}

}  // namespace

HfFolder::HfFolder(const std::string& path) : path_(path) {
  namespace fs = std::filesystem;
  if (!fs::is_directory(path))
    throw InputError("cannot open the model folder " + path, "it is not a folder", "give a folder that holds config.json");
  config_text_ = read_text_file(path + "/config.json", 1 << 20);
  config_ = ModelConfig::from_json(config_text_, path + "/config.json");

  WeightMap map;
  const std::string index_path = path + "/" + kIndexName, single = "model.safetensors";
  const bool sharded = path_exists(index_path);
  if (sharded) {
    index_text_ = read_text_file(index_path, kMaxIndexBytes);
    map = parse_index(index_text_, index_path);
    for (const auto& [tensor, file] : map) shards_.try_emplace(file);
  } else if (path_exists(path + "/" + single)) {
    shards_.try_emplace(single);
  } else {
    throw InputError("cannot open the model folder " + path,
                     std::string("neither ") + kIndexName + " nor model.safetensors is there", kDownloadAgain);
  }

  std::vector<std::string> absent;
  for (const auto& shard : shards_)
    if (!path_exists(path + "/" + shard.first)) absent.push_back(shard.first);
  if (!absent.empty())
    throw InputError("cannot open the model folder " + path, "missing shards: " + some(absent), kDownloadAgain);

  std::vector<std::string> unlisted;
  for (auto& [file, shard] : shards_) {
    shard = std::make_unique<SafetensorsFile>(path + "/" + file);
    for (const TensorEntry& entry : shard->entries()) {
      const auto listed = map.find(entry.name);
      if (sharded && (listed == map.end() || listed->second != file)) unlisted.push_back(entry.name + " in " + file);
      places_[entry.name] = {shard.get(), &entry};
    }
  }
  if (!unlisted.empty())
    throw InputError("cannot open the model folder " + path, "the index does not list " + some(unlisted), kDownloadAgain);
  std::vector<std::string> lost;
  for (const auto& [tensor, file] : map)
    if (!shards_[file]->find(tensor)) lost.push_back(tensor + " in " + file);
  if (!lost.empty())
    throw InputError("cannot open the model folder " + path, "the index lists what shards lack: " + some(lost),
                     kDownloadAgain);

  std::vector<std::string> problems;
  for (const auto& [tensor, at] : places_) {
    if (is_scale(tensor)) {
      const auto weight = places_.find(tensor.substr(0, tensor.size() - 10));
      if (weight == places_.end() || weight->second.entry->dtype != Dtype::F8_E4M3)
        problems.push_back(tensor + " belongs to no F8_E4M3 weight");
      continue;
    }
    if (at.entry->dtype != Dtype::F8_E4M3) continue;
    const auto scale = places_.find(hf_scale_name(tensor));
    if (at.entry->shape.size() != 2) {
      problems.push_back(tensor + " is F8_E4M3 and not a matrix");
    } else if (scale == places_.end()) {
      problems.push_back(tensor + " is F8_E4M3 without " + hf_scale_name(tensor));
    } else {
      const std::vector<int64_t> grid{fp8_blocks(at.entry->shape[0]), fp8_blocks(at.entry->shape[1])};
      if (scale->second.entry->dtype != Dtype::F32 || scale->second.entry->shape != grid)
        problems.push_back(scale->first + " is " + dsa::name(scale->second.entry->dtype) + " " +
                           shape_text(scale->second.entry->shape) + " where F32 " + shape_text(grid) + " is needed");
    }
  }
  std::sort(problems.begin(), problems.end());
  if (!problems.empty()) throw InputError("cannot open the model folder " + path, some(problems), kDownloadAgain);
}

std::vector<std::string> HfFolder::names() const {
  std::vector<std::string> names;
  for (const auto& item : places_) names.push_back(item.first);
  std::sort(names.begin(), names.end());
  return names;
}

const HfFolder::Place& HfFolder::place(const std::string& name) const {
  const auto it = places_.find(name);
  if (it == places_.end())
    throw InputError("cannot read tensor " + name, "the model folder " + path_ + " does not have it",
                     "use the folder of a model of this architecture");
  return it->second;
}

bool HfFolder::has(const std::string& name) const { return places_.count(name) > 0; }
const std::vector<int64_t>& HfFolder::shape(const std::string& name) const { return place(name).entry->shape; }
Dtype HfFolder::stored_dtype(const std::string& name) const { return place(name).entry->dtype; }
uint64_t HfFolder::raw_bytes(const std::string& name) const { return place(name).entry->bytes(); }

void HfFolder::read_raw(const std::string& name, uint64_t offset, uint64_t bytes, void* out) const {
  const Place& at = place(name);
  at.file->read(*at.entry, offset, bytes, out);
}

void HfFolder::read_rows(const std::string& name, int64_t row0, int64_t rows, int64_t col0, int64_t cols,
                         float* out) const {
  const Place& at = place(name);
  const TensorEntry& entry = *at.entry;
  if (entry.shape.size() != 1 && entry.shape.size() != 2)
    throw InputError("cannot read tensor " + name, "its shape is " + shape_text(entry.shape), "only vectors and matrices are read");
  if (!is_readable(entry.dtype))
    throw InputError("cannot read tensor " + name, "its dtype is " + dsa::name(entry.dtype),
                     "convert the folder to F8_E4M3, BF16, F16 or F32");
  const int64_t height = entry.shape.size() == 2 ? entry.shape[0] : 1, width = entry.shape.back();
  if (row0 < 0 || rows < 0 || row0 > height - rows || col0 < 0 || cols < 0 || col0 > width - cols)
    throw std::out_of_range("rows " + std::to_string(row0) + "+" + std::to_string(rows) + ", columns " +
                            std::to_string(col0) + "+" + std::to_string(cols) + " of tensor " + name + " " +
                            shape_text(entry.shape));
  if (rows == 0 || cols == 0) return;

  const bool fp8 = entry.dtype == Dtype::F8_E4M3;
  const uint64_t item = static_cast<uint64_t>(bits(entry.dtype)) / 8;
  std::vector<float> scales;
  if (fp8) scales.resize(static_cast<size_t>(fp8_blocks(width)));
  std::vector<char> bytes;
  for (int64_t r = row0; r < row0 + rows;) {  // one block row at a time
    const int64_t end = std::min(row0 + rows, (r / kFp8Block + 1) * kFp8Block), n = end - r;
    bytes.resize(static_cast<size_t>(n * cols) * item);
    if (cols == width) {
      at.file->read(entry, static_cast<uint64_t>(r * width) * item, bytes.size(), bytes.data());
    } else {
      const uint64_t row_bytes = static_cast<uint64_t>(cols) * item;
      for (int64_t i = 0; i < n; ++i)
        at.file->read(entry, static_cast<uint64_t>((r + i) * width + col0) * item, row_bytes,
                      bytes.data() + static_cast<uint64_t>(i) * row_bytes);
    }
    float* to = out + (r - row0) * cols;
    if (fp8) {
      read_raw(hf_scale_name(name), static_cast<uint64_t>(r / kFp8Block) * scales.size() * 4, scales.size() * 4, scales.data());
      fp8_dequantize(reinterpret_cast<const uint8_t*>(bytes.data()), n, cols, r, col0, scales.data(),
                     static_cast<int64_t>(scales.size()), to);
    } else {
      decode(entry.dtype, bytes, n * cols, to);
    }
    r = end;
  }
}

void HfFolder::check_against(const ModelConfig& config) const {
  if (config_.format() == HfFormat::V32 && !config.indexer)
    throw InputError("cannot use the model folder " + path_, "it has an indexer and the model has none",
                     "give the model the folder's index_n_heads, index_head_dim and index_topk");
  std::vector<std::string> missing, unexpected, wrong;
  std::unordered_map<std::string, bool> expected;
  for (const HfTensor& tensor : hf_tensors(config, config_.format())) {
    expected[tensor.name] = true;
    if (!has(tensor.name))
      missing.push_back(tensor.name);
    else if (shape(tensor.name) != tensor.shape)
      wrong.push_back(tensor.name + " is " + shape_text(shape(tensor.name)) + " instead of " + shape_text(tensor.shape));
    else if (!is_readable(stored_dtype(tensor.name)))
      wrong.push_back(tensor.name + " has dtype " + dsa::name(stored_dtype(tensor.name)));
  }
  for (const auto& item : places_)
    if (!is_scale(item.first) && !expected.count(item.first)) unexpected.push_back(item.first);
  if (missing.empty() && unexpected.empty() && wrong.empty()) return;
  std::sort(unexpected.begin(), unexpected.end());
  std::string why;
  const auto list = [&](const char* title, const std::vector<std::string>& names) {
    if (!names.empty()) why += (why.empty() ? "" : "; ") + std::string(title) + some(names);
  };
  list("missing: ", missing);
  list("unexpected: ", unexpected);
  list("wrong shape or dtype: ", wrong);
  throw InputError("cannot use the model folder " + path_, why, "use the folder and the config of one model");
}

std::string HfFolder::digest() const {
  Digest digest;
  digest.add(config_text_).add(index_text_);
  for (const auto& [file, shard] : shards_)
    digest.add(file).add(shard->header_digest()).add(static_cast<int64_t>(shard->file_bytes())).add(shard->sampled_digest());
  return digest.hex();
}

}  // namespace dsa
