#include "data/megatron_index.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "data/digest.h"
#include "data/error.h"

namespace dsa {
namespace {

constexpr int64_t kChunk = 1 << 20;
constexpr uint64_t kHeader = 9 + 8 + 1 + 8 + 8;
constexpr int64_t kWindows = 64, kWindow = 65536;  // bytes that the digest samples

int item_bytes(int code) {
  switch (code) {
    case 1: case 2: return 1;
    case 3: case 8: return 2;
    case 4: return 4;
    case 5: return 8;
    default: return 0;
  }
}

int64_t id_at(const unsigned char* at, int code) {
  uint64_t bits = 0;
  std::memcpy(&bits, at, static_cast<size_t>(item_bytes(code)));
  switch (code) {
    case 2: return static_cast<int8_t>(bits);
    case 3: return static_cast<int16_t>(bits);
    case 4: return static_cast<int32_t>(bits);
    default: return static_cast<int64_t>(bits);
  }
}

}  // namespace

MegatronTokens::MegatronTokens(const std::string& prefix, int64_t vocab_limit, bool check_ids)
    : prefix_(prefix), bin_(prefix + ".bin") {
  const ReadFile idx(prefix + ".idx");
  const auto refuse = [&](const std::string& why, const char* suggestion = "make or copy both files again") {
    return InputError("cannot use the Megatron data set " + prefix, why, suggestion);
  };
  if (idx.size() < kHeader) throw refuse(".idx is shorter than its header");
  unsigned char header[kHeader];
  idx.read(0, kHeader, header);
  uint64_t version, sequences, entries;
  std::memcpy(&version, header + 9, 8);
  dtype_code_ = header[17];
  std::memcpy(&sequences, header + 18, 8);
  std::memcpy(&entries, header + 26, 8);
  if (std::memcmp(header, "MMIDIDX\0\0", 9) != 0) throw refuse(".idx does not begin with MMIDIDX");
  if (version != 1) throw refuse(".idx has version " + std::to_string(version) + ", only 1 is known");
  item_bytes_ = item_bytes(dtype_code_);
  if (item_bytes_ == 0) throw refuse(".idx has dtype code " + std::to_string(dtype_code_) + ", which is no integer type");
  // A multimodal .idx has one more byte per sequence: refused here.
  const uint64_t room = idx.size() - kHeader;
  if (sequences > room / 12 || entries > room / 8 || sequences * 12 + entries * 8 != room)
    throw refuse(".idx has " + std::to_string(idx.size()) + " bytes, which " + std::to_string(sequences) +
                 " sequences and " + std::to_string(entries) + " document entries do not fill exactly");
  if (entries < 1) throw refuse("it has no document");

  Digest digest;
  digest.add(header, sizeof header).add(static_cast<int64_t>(bin_.size()));
  // Running token counts at the document borders, without holding the sequences.
  std::vector<int32_t> lengths;
  std::vector<int64_t> pointers, borders(static_cast<size_t>(entries));
  const uint64_t pointers_at = kHeader + 4 * sequences, borders_at = pointers_at + 8 * sequences;
  idx.read(borders_at, 8 * entries, borders.data());
  digest.add(borders.data(), 8 * entries);
  for (size_t d = 0; d < entries; ++d)
    if (borders[d] < 0 || borders[d] > static_cast<int64_t>(sequences) || (d > 0 && borders[d] < borders[d - 1]))
      throw refuse("document entry " + std::to_string(d) + " = " + std::to_string(borders[d]) + " is out of order");
  if (borders.front() != 0 || borders.back() != static_cast<int64_t>(sequences))
    throw refuse("its documents do not cover its sequences");
  documents_ = static_cast<int64_t>(entries) - 1;

  size_t next = 0;  // document entry whose border comes next
  const auto reach = [&](int64_t sequence) {
    for (; next + 1 < entries && borders[next] == sequence; ++next)
      if (starts_.empty() || starts_.back() != size_) starts_.push_back(size_);
  };
  for (int64_t at = 0; at < static_cast<int64_t>(sequences); at += kChunk) {
    const size_t n = static_cast<size_t>(std::min<int64_t>(kChunk, static_cast<int64_t>(sequences) - at));
    lengths.resize(n);
    pointers.resize(n);
    idx.read(kHeader + 4 * static_cast<uint64_t>(at), 4 * n, lengths.data());
    idx.read(pointers_at + 8 * static_cast<uint64_t>(at), 8 * n, pointers.data());
    digest.add(lengths.data(), 4 * n).add(pointers.data(), 8 * n);
    for (size_t i = 0; i < n; ++i) {
      reach(at + static_cast<int64_t>(i));
      if (lengths[i] < 0 || pointers[i] != size_ * item_bytes_)
        throw refuse("sequence " + std::to_string(at + static_cast<int64_t>(i)) + " (length " +
                     std::to_string(lengths[i]) + ", byte " + std::to_string(pointers[i]) +
                     ") does not follow the one before it");
      size_ += lengths[i];
    }
  }
  if (size_ < 1) throw refuse("it is empty");
  while (!starts_.empty() && starts_.back() == size_) starts_.pop_back();
  if (static_cast<uint64_t>(size_) * static_cast<uint64_t>(item_bytes_) != bin_.size())
    throw refuse(".bin has " + std::to_string(bin_.size()) + " bytes, .idx needs " + std::to_string(size_ * item_bytes_));

  std::vector<char> window;
  for (int64_t w = 0; w < kWindows; ++w) {
    const int64_t total = static_cast<int64_t>(bin_.size()), begin = total / kWindows * w;
    window.resize(static_cast<size_t>(std::min(kWindow, total - begin)));
    bin_.read(static_cast<uint64_t>(begin), window.size(), window.data());
    digest.add(window.data(), window.size());
  }
  digest_ = digest.hex();

  if (!check_ids) return;
  const int64_t limit = vocab_limit > 0 ? vocab_limit : INT32_MAX;
  std::vector<unsigned char> bytes;
  for (int64_t at = 0; at < size_; at += kChunk) {
    const int64_t n = std::min(kChunk, size_ - at);
    bytes.resize(static_cast<size_t>(n * item_bytes_));
    bin_.read(static_cast<uint64_t>(at * item_bytes_), bytes.size(), bytes.data());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t id = id_at(bytes.data() + i * item_bytes_, dtype_code_);
      if (id < 0 || id >= limit)
        throw refuse("token " + std::to_string(at + i) + " is " + std::to_string(id) + ", the vocabulary ends at " +
                     std::to_string(limit), "use data made with the model's own tokenizer");
    }
  }
}

void MegatronTokens::read(int64_t begin, int64_t n, int32_t* out) const {
  if (begin < 0 || n < 0 || begin > size_ - n)
    throw std::out_of_range("tokens " + std::to_string(begin) + "+" + std::to_string(n) + " of " + prefix_);
  std::vector<unsigned char> bytes(static_cast<size_t>(n * item_bytes_));
  bin_.read(static_cast<uint64_t>(begin * item_bytes_), bytes.size(), bytes.data());
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int32_t>(id_at(bytes.data() + i * item_bytes_, dtype_code_));
}

std::vector<int64_t> MegatronTokens::document_starts(int64_t begin, int64_t end) const {
  const auto first = std::lower_bound(starts_.begin(), starts_.end(), begin);
  return {first, std::max(first, std::lower_bound(starts_.begin(), starts_.end(), end))};
}

}  // namespace dsa
