#include "trainer/checkpoint/save.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <sstream>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "data/error.h"
#include "data/file.h"
#include "parallel/communicator.h"
#include "trainer/checkpoint/manifest.h"
#include "trainer/checkpoint/run_folder.h"
#include "trainer/checkpoint/save_plan.h"
#include "trainer/checkpoint/shard_file.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;

/// The save failed in the same way on all ranks.
struct SaveFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs `work` on every rank and exchanges the results. When it throws on some rank, all ranks throw the same.
std::vector<std::string> together(Communicator& world, const std::function<std::string()>& work) {
  std::string mine;
  try {
    mine = "+" + work();
  } catch (const std::exception& e) {
    mine = std::string("-") + e.what();
  }
  std::vector<std::string> all = world.all_gather_text(mine);
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (all[rank][0] == '-')
      throw SaveFailed((all.size() > 1 ? fmt::format("rank {}: ", rank) : "") + all[rank].substr(1));
    all[rank].erase(0, 1);
  }
  return all;
}

std::vector<HeldBox> held_boxes(const std::vector<StateShard>& shards) {
  std::vector<HeldBox> held;
  for (const StateShard& s : shards) {
    if (s.box.name.empty() || s.box.name.find_first_of(" /@\t\n") != std::string::npos)
      throw std::invalid_argument("cannot save a tensor named '" + s.box.name + "' (a name may not be empty or have " +
                                  "blanks, '/' or '@') give it its HF name");
    if (s.dtype != Dtype::F32 && s.dtype != Dtype::F64 && s.dtype != Dtype::BF16)
      throw std::invalid_argument("cannot save " + s.box.name + " (dtype " + name(s.dtype) +
                                  ") convert it to F32, F64 or BF16");
    if (numel(s.box) > 0 && s.data == nullptr)
      throw std::invalid_argument("cannot save " + s.box.name + " (no data) give the box its memory");
    held.push_back({s.role, s.dtype, s.box});
  }
  return held;
}

// Bytes from `data` (a box) to the first element of a range of its rows.
const void* row_pointer(const StateShard& shard, const Box& rows) {
  if (rows.extent.empty()) return shard.data;
  std::vector<int64_t> one_row = shard.box.extent;
  one_row[0] = 1;
  const uint64_t skip = (rows.offset[0] - shard.box.offset[0]) * bytes_of(shard.dtype, one_row);
  return static_cast<const char*>(shard.data) + skip;
}

class Save {
 public:
  Save(const std::string& run_folder, const TrainingState& state, const std::vector<StateShard>& shards,
       Communicator& world, int keep, const std::function<void(uint64_t)>& wrote)
      : checkpoints_(fs::path(run_folder) / kCheckpointsFolder), state_(state), shards_(shards), world_(world),
        keep_(std::max(keep, 1)), wrote_(wrote), final_(checkpoint_folder(run_folder, state.step)) {}

  SaveResult run() {
    const auto start = std::chrono::steady_clock::now();
    SaveResult result;
    try {
      write_and_commit();
      result.committed = true;
      result.path = final_;
      result.bytes = bytes_;
    } catch (const SaveFailed& e) {
      result.error = e.what();
    } catch (const std::invalid_argument& e) {  // of plan_writers: the same on all ranks
      result.error = e.what();
    }
    if (!result.committed && first() && !staging_.empty()) {
      std::error_code ignored;  // what cannot be removed now is removed before the next save
      fs::remove_all(staging_, ignored);
    }
    const std::string afterwards = world_.all_gather_text(result.committed && first() ? clean_up() : "")[0];
    if (result.committed) result.error = afterwards;
    result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return result;
  }

 private:
  bool first() const { return world_.rank() == 0; }

  void write_and_commit() {
    for (const std::string& text : together(world_, [&] { return encode(held_boxes(shards_)); }))
      held_.push_back(decode(text));
    plan_ = plan_writers(held_);
    staging_ = together(world_, [&] { return first() ? make_staging() : ""; })[0];
    const std::vector<std::string> reports = together(world_, [&] { return write_mine(); });
    together(world_, [&] {
      if (first()) commit(reports);
      return "";
    });
    for (const std::string& report : reports) bytes_ += std::stoull("0" + report.substr(0, report.find(' ')));
  }

  std::string make_staging() {
    std::error_code failed;
    if (fs::create_directories(checkpoints_, failed)) sync_directory(checkpoints_.parent_path().string());
    if (failed)
      throw InputError("cannot create " + checkpoints_.string(), failed.message(), "choose a writable run folder");
    remove_leftovers(checkpoints_.string());
    uint64_t need = uint64_t{1} << 20;
    for (size_t rank = 0; rank < plan_.size(); ++rank)
      for (const PlannedPiece& piece : plan_[rank])  // 1 KiB: HDF5's and the manifest's words about a box
        need += bytes_of(held_[rank][piece.held].dtype, piece.box.extent) + 1024;
    struct statvfs disk;
    if (::statvfs(checkpoints_.c_str(), &disk) != 0)
      throw InputError("cannot ask for the free space of " + checkpoints_.string(), std::strerror(errno),
                       "check that disk");
    const uint64_t free = static_cast<uint64_t>(disk.f_bavail) * disk.f_frsize;
    if (need > free)
      throw InputError("cannot save step " + std::to_string(state_.step),
                       fmt::format("it needs {:.3f} GB and {} has {:.3f} GB free", 1e-9 * static_cast<double>(need),
                                   checkpoints_.string(), 1e-9 * static_cast<double>(free)),
                       "free space, keep fewer checkpoints, or choose another run folder");
    const auto now = std::chrono::system_clock::now().time_since_epoch().count();
    const std::string staging = fmt::format("{}.tmp-{:x}-{:x}", final_, ::getpid(), now);
    if (!fs::create_directory(staging, failed))
      throw InputError("cannot create " + staging, failed ? failed.message() : "it exists",
                       "choose a writable run folder");
    return staging;
  }

  // "bytes whole-hash block,block,... position,position,..." or "" when this rank writes nothing.
  std::string write_mine() {
    const std::vector<PlannedPiece>& pieces = plan_[world_.rank()];
    if (!fs::is_directory(staging_))
      throw InputError("cannot see " + staging_, "rank 0 has just made it",
                       "put the run folder on a file system that all hosts share");
    if (pieces.empty()) return "";
    std::vector<ShardDataset> datasets;
    for (const PlannedPiece& piece : pieces) {
      const StateShard& shard = shards_[piece.held];
      datasets.push_back({dataset_name(shard.role, shard.box.name, piece.box.offset), shard.dtype, piece.box.extent,
                          row_pointer(shard, piece.box)});
    }
    const WrittenShard w = write_shard((fs::path(staging_) / shard_name(world_.rank())).string(), datasets,
                                       kHashBlockBytes, wrote_);
    return fmt::format("{} {} {} {}", w.hash.bytes, w.hash.whole, fmt::join(w.hash.blocks, ","),
                       fmt::join(w.positions, ","));
  }

  static std::string shard_name(int rank) { return fmt::format("shard-r{:04}.h5", rank); }

  void commit(const std::vector<std::string>& reports) {
    Manifest manifest;
    manifest.state = state_;
    for (size_t rank = 0; rank < reports.size(); ++rank) {
      for (const HeldBox& h : held_[rank])  // also those without elements
        manifest.entries[h.role].try_emplace(h.box.name, StoredEntry{h.dtype, h.box.global_shape, {}});
      if (reports[rank].empty()) continue;
      StoredFile file{shard_name(static_cast<int>(rank)), {}};
      std::string blocks, positions, item;
      std::istringstream(reports[rank]) >> file.hash.bytes >> file.hash.whole >> blocks >> positions;
      for (std::istringstream in(blocks); std::getline(in, item, ',');) file.hash.blocks.push_back(item);
      std::istringstream in(positions);
      for (const PlannedPiece& piece : plan_[rank]) {
        std::getline(in, item, ',');
        const HeldBox& h = held_[rank][piece.held];
        manifest.entries[h.role][h.box.name].boxes.push_back({manifest.files.size(), std::stoull(item), piece.box});
      }
      manifest.files.push_back(std::move(file));
    }
    const std::string text = manifest.to_text();
    Manifest::from_text(text, "the manifest of " + staging_);  // a state that cannot be read back is not committed
    write_text_file((fs::path(staging_) / kManifestFile).string(), text, true);
    sync_directory(staging_);
    publish();
    sync_directory(checkpoints_.string());
  }

  void publish() {
    const bool replaces = path_exists(final_);
    // An earlier checkpoint of this step changes places with the new one; then it is a leftover under the staging name.
    if (::renameat2(AT_FDCWD, staging_.c_str(), AT_FDCWD, final_.c_str(), replaces ? RENAME_EXCHANGE : 0) == 0) return;
    if (errno != EINVAL && errno != ENOSYS)
      throw InputError("cannot rename " + staging_, std::strerror(errno), "check that disk");
    // This file system cannot exchange names (NFS): two renames.
    if (replaces) fs::rename(final_, final_ + ".trash");
    fs::rename(staging_, final_);
  }

  // After the commit; its failures cost disk space, never a checkpoint, and the next save tries again.
  std::string clean_up() {
    try {
      write_text_file((checkpoints_ / "LATEST").string(), fs::path(final_).filename().string() + "\n", true);
      remove_leftovers(checkpoints_.string());
      std::vector<int64_t> steps = checkpoint_steps(checkpoints_.parent_path().string());
      std::erase_if(steps, [&](int64_t step) { return step > state_.step; });
      for (size_t i = 0; i + keep_ < steps.size(); ++i) {
        const std::string old = checkpoint_folder(checkpoints_.parent_path().string(), steps[i]);
        fs::rename(old, old + ".trash");  // at once, so that a half-removed folder is never taken for a checkpoint
        remove_leftovers(checkpoints_.string());
      }
    } catch (const std::exception& e) {
      return fmt::format("cannot tidy {} ({}) the checkpoint itself is written", checkpoints_.string(), e.what());
    }
    return "";
  }

  fs::path checkpoints_;
  const TrainingState& state_;
  const std::vector<StateShard>& shards_;
  Communicator& world_;
  size_t keep_;
  const std::function<void(uint64_t)>& wrote_;
  std::string final_, staging_;
  std::vector<std::vector<HeldBox>> held_;         // by rank
  std::vector<std::vector<PlannedPiece>> plan_;    // by rank
  uint64_t bytes_ = 0;
};

}  // namespace

SaveResult save_checkpoint(const std::string& run_folder, const TrainingState& state,
                           const std::vector<StateShard>& shards, Communicator& world, int keep,
                           const std::function<void(uint64_t)>& wrote) {
  return Save(run_folder, state, shards, world, keep, wrote).run();
}

}  // namespace dsa
