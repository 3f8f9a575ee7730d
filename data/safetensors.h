// The safetensors file: u64 little-endian N | N bytes of JSON header | data.
//   header: {"NAME": {"dtype": D, "shape": [..], "data_offsets": [begin, end]}, ..., "__metadata__": {str: str}}
// Rules are those of the reference implementation, made strict: duplicate keys and unknown fields are refused.
// Data may start at an odd byte (released headers are not padded), so everything is read with pread into the
// caller's buffer and never through a cast pointer. Row-major, little-endian.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "data/dtype.h"
#include "data/file.h"

namespace dsa {

struct TensorEntry {
  std::string name;
  Dtype dtype;
  std::vector<int64_t> shape;
  uint64_t begin, end;  // bytes, from the start of the data
  uint64_t bytes() const { return end - begin; }
};

// One validated file, kept open. The constructor reads the header alone; throws InputError.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const std::vector<TensorEntry>& entries() const { return entries_; }  // in data order
  const TensorEntry* find(const std::string& name) const;               // nullptr: absent
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  uint64_t file_bytes() const { return file_.size(); }
  const std::string& header_digest() const { return header_digest_; }  // XXH3-128 of the header's bytes, hex

  // XXH3-128 (hex) of 16 windows of 4 KiB, evenly spaced over the data: tells retrained weights under an equal header
  // without reading them all.
  std::string sampled_digest() const;

  // `bytes` bytes from byte `offset` of the tensor. Throws InputError if the file has become shorter.
  void read(const TensorEntry& entry, uint64_t offset, uint64_t bytes, void* out) const;

 private:
  ReadFile file_;
  std::vector<TensorEntry> entries_;
  std::unordered_map<std::string, size_t> by_name_;
  std::map<std::string, std::string> metadata_;
  std::string header_digest_;
  uint64_t data_start_ = 0;
};

struct TensorInfo {
  std::string name;
  Dtype dtype;
  std::vector<int64_t> shape;
};

uint64_t tensor_bytes(Dtype dtype, const std::vector<int64_t>& shape);

// Header first, then tensors in any order and in pieces. The bytes appear under `path` at commit() and not
// before (temporary file, fsync, rename); a writer that is destroyed without commit leaves nothing.
// Tensors lie by dtype descending, then by name; the header is padded so that data start at a multiple of 8.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::string& path, std::vector<TensorInfo> tensors,
                    std::map<std::string, std::string> metadata = {}, bool overwrite = false);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  void write(const std::string& name, uint64_t offset, const void* bytes, uint64_t n);
  void write(const std::string& name, const void* bytes);  // the whole tensor
  bool complete() const { return missing_bytes_ == 0; }
  void commit();  // throws unless every byte of every tensor was written exactly once

 private:
  struct Slot {
    TensorEntry entry;
    std::map<uint64_t, uint64_t> written;  // begin -> end of the pieces, merged
  };
  std::string path_;
  bool overwrite_;
  std::unordered_map<std::string, Slot> slots_;
  std::unique_ptr<TempFile> file_;
  uint64_t data_start_ = 0;
  uint64_t missing_bytes_ = 0;
};

}  // namespace dsa
