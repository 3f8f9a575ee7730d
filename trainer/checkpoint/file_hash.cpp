#include "trainer/checkpoint/file_hash.h"

#include <algorithm>

#include "data/digest.h"

namespace dsa {
namespace {

constexpr uint64_t kPieceBytes = uint64_t{4} << 20;

}  // namespace

FileHash hash_file(const ReadFile& file, uint64_t block_bytes,
                   const std::function<void(uint64_t, const char*, uint64_t)>& see) {
  FileHash hash;
  hash.bytes = file.size();
  std::vector<char> piece(std::min(kPieceBytes, std::max<uint64_t>(hash.bytes, 1)));
  Digest whole;
  for (uint64_t begin = 0; begin < hash.bytes; begin += block_bytes) {
    const uint64_t end = std::min(begin + block_bytes, hash.bytes);
    Digest block;
    for (uint64_t at = begin; at < end; at += piece.size()) {
      const uint64_t n = std::min<uint64_t>(piece.size(), end - at);
      file.read(at, n, piece.data());
      whole.add(piece.data(), n);
      block.add(piece.data(), n);
      if (see) see(at, piece.data(), n);
    }
    hash.blocks.push_back(block.hex());
  }
  hash.whole = whole.hex();
  return hash;
}

std::string hash_block(const ReadFile& file, uint64_t block_bytes, uint64_t index) {
  const uint64_t begin = index * block_bytes, end = std::min(begin + block_bytes, file.size());
  std::vector<char> piece(std::min(kPieceBytes, end - begin));
  Digest block;
  for (uint64_t at = begin; at < end; at += piece.size()) {
    const uint64_t n = std::min<uint64_t>(piece.size(), end - at);
    file.read(at, n, piece.data());
    block.add(piece.data(), n);
  }
  return block.hex();
}

}  // namespace dsa
