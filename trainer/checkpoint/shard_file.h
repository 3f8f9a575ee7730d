// One rank's shard of a checkpoint: an HDF5 file (libver latest, contiguous, no filter) with a dataset per box.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/dtype.h"
#include "trainer/checkpoint/file_hash.h"

namespace dsa {

struct ShardDataset {
  std::string name;
  Dtype dtype = Dtype::F32;
  std::vector<int64_t> extent;  ///< not empty of elements
  const void* data = nullptr;
};

struct WrittenShard {
  FileHash hash;
  std::vector<uint64_t> positions;  ///< of each dataset's first byte in the file
};

/// Writes, closes and fsyncs `path`, then reads it back once: every dataset's bytes are compared with memory while the
/// file is hashed. (A full disk can pass HDF5's flush and close unseen.) Throws InputError. `wrote` hears the bytes of
/// each dataset.
WrittenShard write_shard(const std::string& path, const std::vector<ShardDataset>& datasets, uint64_t block_bytes,
                         const std::function<void(uint64_t)>& wrote = {});

}  // namespace dsa
