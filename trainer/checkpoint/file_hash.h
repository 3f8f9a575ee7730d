// XXH3-128 of a file: of the whole, and of each block of block_bytes (the last is shorter), as 32 hex digits each.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/file.h"

namespace dsa {

constexpr uint64_t kHashBlockBytes = uint64_t{64} << 20;

struct FileHash {
  uint64_t bytes = 0;
  std::string whole;
  std::vector<std::string> blocks;
  bool operator==(const FileHash&) const = default;
};

/// Reads the file once, front to back, in pieces of a few MiB; `see` gets each piece with its offset.
FileHash hash_file(const ReadFile& file, uint64_t block_bytes,
                   const std::function<void(uint64_t offset, const char* bytes, uint64_t n)>& see = {});

/// The hash of block `index` alone.
std::string hash_block(const ReadFile& file, uint64_t block_bytes, uint64_t index);

}  // namespace dsa
