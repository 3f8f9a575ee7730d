#include "trainer/checkpoint/checkpoint_reader.h"

#include <algorithm>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "data/error.h"
#include "data/float_formats.h"
#include "trainer/checkpoint/manifest.h"
#include "trainer/checkpoint/run_folder.h"
#include "trainer/checkpoint/save_plan.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kManifestLimit = uint64_t{4} << 30;
constexpr size_t kOpenFiles = 64;         // at a time: a checkpoint of many ranks has more files than a process may open
constexpr int64_t kConvertElements = 1 << 18;

double element(Dtype dtype, const char* from) {
  if (dtype == Dtype::F64) {
    double value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  if (dtype == Dtype::F32) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  uint16_t value;
  std::memcpy(&value, from, sizeof value);
  return bf16_to_float(value);
}

void convert(Dtype from_dtype, const char* from, int64_t n, Dtype to_dtype, char* to) {
  const int step = bits(from_dtype) / 8;
  for (int64_t i = 0; i < n; ++i, from += step)
    if (to_dtype == Dtype::F64)
      reinterpret_cast<double*>(to)[i] = element(from_dtype, from);
    else
      reinterpret_cast<float*>(to)[i] = static_cast<float>(element(from_dtype, from));
}

std::string list(const std::vector<int64_t>& v) { return fmt::format("[{}]", fmt::join(v, ", ")); }

// The folder that `path` means.
std::string resolve(const std::string& path) {
  if (path_exists((fs::path(path) / kManifestFile).string())) return path;
  if (fs::is_directory(fs::path(path) / kCheckpointsFolder)) {
    std::vector<std::string> why;
    if (const auto newest = CheckpointReader::newest_valid(path, &why)) return *newest;
    throw InputError("no usable checkpoint in " + path,
                     why.empty() ? "its folder of checkpoints is empty" : fmt::format("{}", fmt::join(why, "; ")),
                     "start from other weights");
  }
  const fs::path parent = fs::path(path).parent_path();
  if (!path_exists(path) && parent.filename() == kCheckpointsFolder) {
    const std::vector<int64_t> steps = checkpoint_steps(parent.parent_path().string());
    throw InputError("no checkpoint " + path,
                     steps.empty() ? "the run has none" : fmt::format("the run has those of steps {}", fmt::join(steps, ", ")),
                     "choose one of the run, or give the run folder to take the newest");
  }
  throw InputError("no checkpoint in " + path,
                   path_exists(path) ? fmt::format("it has neither {} nor {}/", kManifestFile, kCheckpointsFolder)
                                     : "there is no such folder",
                   "give a run folder or one of its checkpoints");
}

}  // namespace

struct CheckpointReader::Impl {
  std::string path, digest;
  Manifest manifest;
  mutable std::vector<std::unique_ptr<ReadFile>> open;     // by file
  mutable std::vector<std::vector<bool>> verified;         // by file, by block
  mutable size_t open_count = 0;

  explicit Impl(const std::string& folder) : path(folder) {
    const std::string file = (fs::path(folder) / kManifestFile).string();
    const std::string text = read_text_file(file, kManifestLimit);
    manifest = Manifest::from_text(text, file);
    digest = manifest_digest(text);
    open.resize(manifest.files.size());
    for (const StoredFile& f : manifest.files) {
      verified.emplace_back(f.hash.blocks.size(), false);
      const fs::path shard = fs::path(folder) / f.name;
      std::error_code failed;
      const uint64_t bytes = fs::file_size(shard, failed);
      if (failed) refuse(shard.string() + " is missing", failed.message());
      if (bytes != f.hash.bytes)
        refuse(shard.string() + (bytes < f.hash.bytes ? " is truncated" : " has grown"),
               fmt::format("{} bytes, written were {}", bytes, f.hash.bytes));
    }
  }

  [[noreturn]] static void refuse(const std::string& problem, const std::string& why) {
    throw InputError(problem, why, "restore the file or take an older checkpoint");
  }

  const ReadFile& file(size_t index) const {
    if (!open[index]) {
      if (open_count == kOpenFiles) {
        for (auto& f : open) f.reset();
        open_count = 0;
      }
      open[index] = std::make_unique<ReadFile>((fs::path(path) / manifest.files[index].name).string());
      ++open_count;
    }
    return *open[index];
  }

  void verify_block(size_t index, uint64_t block) const {
    if (verified[index][block]) return;
    const ReadFile& f = file(index);
    const StoredFile& stored = manifest.files[index];
    if (f.size() != stored.hash.bytes) refuse(f.path() + " has changed", "its size is not what it was at opening");
    const std::string hash = hash_block(f, manifest.block_bytes, block);
    if (hash != stored.hash.blocks[block]) {
      std::string why = fmt::format("block {} of {}, bytes {} to {}, has the hash {}, written was {}", block,
                                    stored.hash.blocks.size(), block * manifest.block_bytes,
                                    std::min((block + 1) * manifest.block_bytes, f.size()), hash,
                                    stored.hash.blocks[block]);
      for (const StoredFile& other : manifest.files)
        if (&other != &stored && block < other.hash.blocks.size() && other.hash.blocks[block] == hash)
          why = "it holds the bytes of " + other.name + ": files were swapped or copied";
      refuse(f.path() + " is damaged", why);
    }
    verified[index][block] = true;
  }

  void read_bytes(size_t index, uint64_t position, uint64_t n, void* out) const {
    if (n == 0) return;
    for (uint64_t b = position / manifest.block_bytes; b <= (position + n - 1) / manifest.block_bytes; ++b)
      verify_block(index, b);
    file(index).read(position, n, out);
  }

  const StoredEntry* find(const std::string& name, Role role) const {
    const auto by_name = manifest.entries.find(role);
    if (by_name == manifest.entries.end()) return nullptr;
    const auto entry = by_name->second.find(name);
    return entry == by_name->second.end() ? nullptr : &entry->second;
  }

  const StoredEntry& entry(const std::string& name, Role role) const {
    if (const StoredEntry* e = find(name, role)) return *e;
    throw InputError(path + " has no " + role_name(role) + " of " + name, "it was saved by another model or stage",
                     "choose a checkpoint of this model, or start from it with init_from");
  }
};

CheckpointReader::CheckpointReader(const std::string& path) : impl_(std::make_unique<Impl>(resolve(path))) {}
CheckpointReader::~CheckpointReader() = default;
CheckpointReader::CheckpointReader(CheckpointReader&&) noexcept = default;

const TrainingState& CheckpointReader::state() const { return impl_->manifest.state; }
const std::string& CheckpointReader::path() const { return impl_->path; }
std::string CheckpointReader::digest() const { return impl_->digest; }

uint64_t CheckpointReader::bytes() const {
  uint64_t bytes = 0;
  for (const StoredFile& f : impl_->manifest.files) bytes += f.hash.bytes;
  return bytes;
}

std::vector<std::string> CheckpointReader::names(Role role) const {
  std::vector<std::string> names;
  const auto by_name = impl_->manifest.entries.find(role);
  if (by_name != impl_->manifest.entries.end())
    for (const auto& [name, entry] : by_name->second) names.push_back(name);
  return names;
}

bool CheckpointReader::has(const std::string& name, Role role) const { return impl_->find(name, role) != nullptr; }

std::vector<int64_t> CheckpointReader::shape(const std::string& name, Role role) const {
  return impl_->entry(name, role).shape;
}

Dtype CheckpointReader::stored_dtype(const std::string& name, Role role) const {
  return impl_->entry(name, role).dtype;
}

void CheckpointReader::read(const ShardSpec& box, Role role, Dtype dtype, void* out) const {
  const StoredEntry& entry = impl_->entry(box.name, role);
  if (entry.shape != box.global_shape)
    throw InputError(fmt::format("{} has {} of {} in the shape {}", impl_->path, role_name(role), box.name,
                                 list(entry.shape)),
                     "the model asks for " + list(box.global_shape), "choose a checkpoint of this model");
  if (dtype != entry.dtype && dtype != Dtype::F32 && dtype != Dtype::F64)
    throw InputError(fmt::format("cannot read {} of {} as {}", role_name(role), box.name, dsa::name(dtype)),
                     "it is stored as " + dsa::name(entry.dtype), "read it as F32 or F64");
  const uint64_t stored_size = bits(entry.dtype) / 8, size = bits(dtype) / 8;
  const size_t dims = box.extent.size();
  std::vector<char> buffer;
  for (const StoredBox& stored : entry.boxes) {
    const std::optional<Box> common = overlap(stored.box, box.box());
    if (!common) continue;
    // A run is contiguous in both boxes: the trailing dimensions that both have whole, times one more dimension.
    size_t run_dim = dims;
    int64_t run = 1;
    while (run_dim > 0) {
      --run_dim;
      run *= common->extent[run_dim];
      if (common->extent[run_dim] != stored.box.extent[run_dim] || common->extent[run_dim] != box.extent[run_dim]) break;
    }
    std::vector<int64_t> at = common->offset;
    const auto index_in = [&](const std::vector<int64_t>& offset, const std::vector<int64_t>& extent) {
      int64_t index = 0;
      for (size_t d = 0; d < dims; ++d) index = index * extent[d] + at[d] - offset[d];
      return static_cast<uint64_t>(index);
    };
    for (bool more = true; more;) {
      const uint64_t from = stored.position + index_in(stored.box.offset, stored.box.extent) * stored_size;
      char* to = static_cast<char*>(out) + index_in(box.offset, box.extent) * size;
      if (dtype == entry.dtype) {
        impl_->read_bytes(stored.file, from, run * stored_size, to);
      } else {
        buffer.resize(std::min(run, kConvertElements) * stored_size);
        for (int64_t i = 0; i < run; i += kConvertElements) {
          const int64_t n = std::min(kConvertElements, run - i);
          impl_->read_bytes(stored.file, from + i * stored_size, n * stored_size, buffer.data());
          convert(entry.dtype, buffer.data(), n, dtype, to + i * size);
        }
      }
      more = false;
      for (size_t d = run_dim; d-- > 0;) {  // the next run: count up the dimensions before it
        if (++at[d] < common->offset[d] + common->extent[d]) {
          more = true;
          break;
        }
        at[d] = common->offset[d];
      }
    }
  }
}

void CheckpointReader::verify(int part, int parts) const {
  int64_t turn = 0;
  for (size_t f = 0; f < impl_->manifest.files.size(); ++f)
    for (uint64_t b = 0; b < impl_->manifest.files[f].hash.blocks.size(); ++b)
      if (turn++ % parts == part) impl_->verify_block(f, b);
}

}  // namespace dsa
