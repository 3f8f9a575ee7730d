// MANIFEST.json of a native checkpoint:
//
//   { "format": "dsatrain.checkpoint", "version": 1, "block_bytes": 67108864,
//     "files":   [ {"name", "bytes", "xxh3_128", "blocks": [hash of each block]} ... ],
//     "state":   { TrainingState },
//     "tensors": { ROLE: { NAME: {"dtype", "shape", "boxes": [[file, byte position, [offset], [extent]] ...]} } },
//     "xxh3_128": hash of every byte before this key's comma }
//
// A box lies at its byte position in its file, contiguous, row-major, little-endian; for people and other programs it
// is also the HDF5 dataset dataset_name(role, name, offset) there.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "trainer/checkpoint/file_hash.h"
#include "trainer/checkpoint/state_shard.h"

namespace dsa {

constexpr const char* kManifestFile = "MANIFEST.json";

struct StoredFile {
  std::string name;
  FileHash hash;
  bool operator==(const StoredFile&) const = default;
};

struct StoredBox {
  size_t file = 0;
  uint64_t position = 0;
  Box box;
  bool operator==(const StoredBox&) const = default;
};

struct StoredEntry {
  Dtype dtype = Dtype::F32;
  std::vector<int64_t> shape;
  std::vector<StoredBox> boxes;
  bool operator==(const StoredEntry&) const = default;
};

struct Manifest {
  TrainingState state;
  uint64_t block_bytes = kHashBlockBytes;
  std::vector<StoredFile> files;
  std::map<Role, std::map<std::string, StoredEntry>> entries;

  std::string to_text() const;
  /// Checks everything that can be checked without the files: version, own hash, types, boxes inside their tensor and
  /// their file, coverage. Throws InputError that begins with `what`.
  static Manifest from_text(const std::string& text, const std::string& what);
  bool operator==(const Manifest&) const = default;
};

/// The hash at the end of a manifest's text, or "".
std::string manifest_digest(const std::string& text);

/// PARAM/model.norm.weight@0
std::string dataset_name(Role role, const std::string& name, const std::vector<int64_t>& offset);

}  // namespace dsa
