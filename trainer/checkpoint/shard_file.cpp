#include "trainer/checkpoint/shard_file.h"

#include <fcntl.h>
#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>

#include "data/error.h"
#include "data/hdf5_file.h"
#include "trainer/checkpoint/save_plan.h"

namespace dsa {
namespace {

void sync_file(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool ok = fd >= 0 && ::fsync(fd) == 0;
  const std::string why = std::strerror(errno);
  if (fd >= 0) ::close(fd);
  if (!ok) throw InputError("cannot sync " + path, why, "check that disk");
}

// Where HDF5 put each dataset's bytes: known once the file is closed.
std::vector<uint64_t> dataset_positions(const std::string& path, const std::vector<ShardDataset>& datasets) {
  std::vector<uint64_t> positions;
  const hid_t file = H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  for (const ShardDataset& dataset : datasets) {
    const hid_t id = file < 0 ? file : H5Dopen2(file, dataset.name.c_str(), H5P_DEFAULT);
    const haddr_t position = id < 0 ? HADDR_UNDEF : H5Dget_offset(id);
    if (id >= 0) H5Dclose(id);
    if (position == HADDR_UNDEF) break;
    positions.push_back(position);
  }
  if (file >= 0) H5Fclose(file);
  if (positions.size() != datasets.size())
    throw InputError("cannot find " + datasets[positions.size()].name + " in " + path,
                     "it was written a moment ago", "check that disk");
  return positions;
}

}  // namespace

WrittenShard write_shard(const std::string& path, const std::vector<ShardDataset>& datasets, uint64_t block_bytes,
                         const std::function<void(uint64_t)>& wrote) {
  Hdf5File file = Hdf5File::create(path);
  for (const ShardDataset& d : datasets) {
    file.write_dataset(d.name, d.dtype, d.extent, d.data);
    if (wrote) wrote(bytes_of(d.dtype, d.extent));
  }
  file.close();
  sync_file(path);

  WrittenShard written;
  written.positions = dataset_positions(path, datasets);
  std::vector<size_t> order(datasets.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return written.positions[a] < written.positions[b]; });
  size_t first = 0;  // datasets before it end before the current piece
  written.hash = hash_file(ReadFile(path), block_bytes, [&](uint64_t offset, const char* bytes, uint64_t n) {
    for (size_t i = first; i < order.size(); ++i) {
      const ShardDataset& d = datasets[order[i]];
      const uint64_t begin = written.positions[order[i]], end = begin + bytes_of(d.dtype, d.extent);
      if (begin >= offset + n) break;
      if (end <= offset) {
        first = i + 1;
        continue;
      }
      const uint64_t from = std::max(begin, offset), to = std::min(end, offset + n);
      if (std::memcmp(bytes + (from - offset), static_cast<const char*>(d.data) + (from - begin), to - from) != 0)
        throw InputError("cannot trust " + path, d.name + " reads back differently from what was written",
                         "free space on that disk or check it");
    }
  });
  return written;
}

}  // namespace dsa
