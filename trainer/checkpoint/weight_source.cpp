#include "trainer/checkpoint/weight_source.h"

#include <algorithm>
#include <filesystem>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "data/digest.h"
#include "data/error.h"
#include "data/file.h"
#include "data/fp8_block.h"
#include "data/hf_names.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/manifest.h"
#include "trainer/checkpoint/run_folder.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxBases = 8;  // a checkpoint on a checkpoint on ...; more is a mistake

void require_shape(const std::string& where, const ShardSpec& box, const std::vector<int64_t>& stored) {
  if (box.global_shape == stored) return;
  throw InputError(fmt::format("{} has {} in the shape [{}]", where, box.name, fmt::join(stored, ", ")),
                   fmt::format("the model asks for [{}]", fmt::join(box.global_shape, ", ")),
                   "check that the folder is of this model");
}

class HfSource final : public WeightSource {
 public:
  explicit HfSource(const std::string& path) : folder_(path) {}

  const ModelConfig& config() const override { return folder_.config(); }
  bool has(const std::string& name) const override { return folder_.has(name); }
  std::vector<int64_t> shape(const std::string& name) const override { return folder_.shape(name); }

  void read(const ShardSpec& box, Dtype dtype, void* out) const override {
    require_shape(folder_.path(), box, folder_.shape(box.name));
    if (numel(box) == 0) return;
    const bool matrix = box.extent.size() == 2;
    const int64_t row0 = matrix ? box.offset[0] : 0, rows = matrix ? box.extent[0] : 1;
    const int64_t col0 = box.offset.back(), cols = box.extent.back();
    if (dtype == Dtype::F32) {
      folder_.read_rows(box.name, row0, rows, col0, cols, static_cast<float*>(out));
      return;
    }
    // F64: in blocks of rows, so that no second copy of the slice is held.
    std::vector<float> block(std::min(rows, kFp8Block) * cols);
    for (int64_t r = 0; r < rows; r += kFp8Block) {
      const int64_t n = std::min(kFp8Block, rows - r);
      folder_.read_rows(box.name, row0 + r, n, col0, cols, block.data());
      std::copy_n(block.data(), n * cols, static_cast<double*>(out) + r * cols);
    }
  }

  std::string describe() const override {
    return fmt::format("HF folder {} ({}, {} layers, {} shards)", folder_.path(),
                       config().indexer ? "V3.2" : "V3.1", config().num_hidden_layers, folder_.shard_count());
  }
  std::string path() const override { return folder_.path(); }
  std::string digest() const override { return folder_.digest(); }
  const HfFolder* raw(const std::string& name) const override { return folder_.has(name) ? &folder_ : nullptr; }
  std::string hf_folder() const override { return folder_.path(); }
  void check() const override { folder_.check_against(folder_.config()); }
  std::string tokenizer_sha256() const override {
    const std::string file = (fs::path(folder_.path()) / "tokenizer.json").string();
    return path_exists(file) ? sha256_of_file(file) : "";
  }

 private:
  HfFolder folder_;
};

std::unique_ptr<WeightSource> open_at_depth(const std::string& path, int depth);

class CheckpointSource final : public WeightSource {
 public:
  CheckpointSource(const std::string& path, int depth)
      : reader_(path), config_(ModelConfig::from_json(reader_.state().model_json, reader_.path() + "'s model")) {
    const TrainingState& state = reader_.state();
    if (state.base_path.empty()) return;
    if (!path_exists(state.base_path))
      throw InputError(fmt::format("{} needs the frozen weights of {}", reader_.path(), state.base_path),
                       "that folder is gone", "put it back there");
    base_ = open_at_depth(state.base_path, depth + 1);
    if (base_->digest() != state.base_digest)
      throw InputError(fmt::format("{} was trained on other weights than {} now has", reader_.path(), state.base_path),
                       fmt::format("its digest is {}, it was {}", base_->digest(), state.base_digest),
                       "put the folder back that it started from");
  }

  const ModelConfig& config() const override { return config_; }
  bool has(const std::string& name) const override { return trained(name) || (base_ && base_->has(name)); }

  std::vector<int64_t> shape(const std::string& name) const override {
    if (trained(name)) return reader_.shape(name, role(name));
    return base(name).shape(name);
  }

  void read(const ShardSpec& box, Dtype dtype, void* out) const override {
    if (trained(box.name))
      reader_.read(box, role(box.name), dtype, out);
    else
      base(box.name).read(box, dtype, out);
  }

  std::string describe() const override {
    return fmt::format("checkpoint {} (step {}, {}{})", reader_.path(), reader_.state().step, reader_.state().stage,
                       base_ ? ", frozen weights in " + base_->path() : "");
  }
  std::string path() const override { return reader_.path(); }
  std::string digest() const override { return reader_.digest(); }
  const HfFolder* raw(const std::string& name) const override {
    return trained(name) || !base_ ? nullptr : base_->raw(name);
  }
  std::string hf_folder() const override { return base_ ? base_->hf_folder() : ""; }
  std::string tokenizer_sha256() const override { return reader_.state().tokenizer_sha256; }

  void check() const override {
    if (base_) base_->check();
    std::vector<std::string> problems;
    for (const HfTensor& tensor : hf_tensors(config_, config_.format())) {
      if (!tensor.duplicate_of.empty()) continue;
      if (!has(tensor.name))
        problems.push_back(tensor.name + " is missing");
      else if (shape(tensor.name) != tensor.shape)
        problems.push_back(fmt::format("{} is [{}] instead of [{}]", tensor.name, fmt::join(shape(tensor.name), ", "),
                                       fmt::join(tensor.shape, ", ")));
    }
    if (problems.empty()) return;
    const size_t shown = std::min<size_t>(problems.size(), 10);
    std::string why = fmt::format("{}", fmt::join(problems.begin(), problems.begin() + shown, "; "));
    if (problems.size() > shown) why += fmt::format("; and {} more", problems.size() - shown);
    throw InputError("cannot use the checkpoint " + reader_.path(), why, "take another checkpoint of this model");
  }

 private:
  bool trained(const std::string& name) const {
    return reader_.has(name, Role::PARAM) || reader_.has(name, Role::BUFFER);
  }
  Role role(const std::string& name) const { return reader_.has(name, Role::PARAM) ? Role::PARAM : Role::BUFFER; }
  const WeightSource& base(const std::string& name) const {
    if (base_) return *base_;
    throw InputError(reader_.path() + " has no " + name, "it is self-contained and was saved without it",
                     "choose a checkpoint of this model");
  }

  CheckpointReader reader_;
  ModelConfig config_;
  std::unique_ptr<WeightSource> base_;
};

std::unique_ptr<WeightSource> open_at_depth(const std::string& path, int depth) {
  if (depth > kMaxBases)
    throw InputError("cannot open " + path, "it is the base of a base of a base, more than " +
                     std::to_string(kMaxBases) + " deep", "start from an exported folder");
  const fs::path folder(path);
  if (!fs::exists(folder)) {
    if (folder.parent_path().filename() == kCheckpointsFolder) return std::make_unique<CheckpointSource>(path, depth);
    throw InputError("cannot open " + path, "there is no such folder", "check the path");
  }
  if (fs::exists(folder / kManifestFile) || fs::is_directory(folder / kCheckpointsFolder))
    return std::make_unique<CheckpointSource>(path, depth);
  if (fs::exists(folder / "config.json")) return std::make_unique<HfSource>(path);
  throw InputError("cannot take weights from " + path,
                   fmt::format("it has no config.json, no {} and no {}/", kManifestFile, kCheckpointsFolder),
                   "give an HF folder, a checkpoint or a run folder");
}

}  // namespace

std::unique_ptr<WeightSource> open_weights(const std::string& path) { return open_at_depth(path, 0); }

}  // namespace dsa
