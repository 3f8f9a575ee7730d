#include "data/hdf5_tokens.h"

#include <algorithm>
#include <stdexcept>

#include "data/digest.h"
#include "data/error.h"

namespace dsa {
namespace {

constexpr int64_t kBlock = 4096;        // offsets between two entries of the index in memory
constexpr int64_t kChunk = 256 * kBlock;
constexpr int64_t kWindows = 64, kWindow = 16384;  // tokens that the digest samples

}  // namespace

Hdf5Tokens::Hdf5Tokens(const std::string& path, int64_t vocab_limit, bool check_ids) : file_(Hdf5File::open(path)) {
  const auto refuse = [&](const std::string& why, const char* suggestion = "make the file again with tools/tokenize.py") {
    return InputError("cannot use the token file " + path, why, suggestion);
  };
  const auto format = file_.string_attribute("format");
  if (!format || *format != "dsatrain.tokens") throw refuse("its attribute format is not dsatrain.tokens");
  const auto version = file_.int_attribute("version");
  if (!version || *version != 1) throw refuse("its version is not 1");
  const auto integer = [&](const char* key) {
    const auto value = file_.int_attribute(key);
    if (!value) throw refuse(std::string("it has no attribute ") + key);
    return *value;
  };
  vocab_size_ = integer("vocab_size");
  bos_id_ = integer("bos_id");
  eos_id_ = integer("eos_id");
  tokenizer_sha256_ = file_.string_attribute("tokenizer_sha256").value_or("");
  source_ = file_.string_attribute("source").value_or("");
  if (tokenizer_sha256_.empty()) throw refuse("it has no attribute tokenizer_sha256");
  if (vocab_size_ < 1 || vocab_size_ > INT32_MAX) throw refuse("its vocab_size is " + std::to_string(vocab_size_));
  for (int64_t id : {bos_id_, eos_id_})
    if (id < -1 || id >= vocab_size_) throw refuse("its BOS or EOS id " + std::to_string(id) + " is outside its vocabulary");
  if (vocab_limit > 0 && vocab_size_ > vocab_limit)
    throw refuse("its vocabulary of " + std::to_string(vocab_size_) + " exceeds the model's " + std::to_string(vocab_limit),
                 "use the model's own tokenizer");

  for (const char* name : {"tokens", "document_offsets"})
    if (!file_.has(name) || file_.shape(name).size() != 1) throw refuse(std::string("it has no vector /") + name);
  if (file_.dtype("tokens") != Dtype::U32) throw refuse("/tokens is not uint32");
  if (file_.dtype("document_offsets") != Dtype::I64) throw refuse("/document_offsets is not int64");
  size_ = file_.shape("tokens")[0];
  documents_ = file_.shape("document_offsets")[0] - 1;
  if (size_ < 1 || documents_ < 1) throw refuse("it is empty");

  Digest digest;
  digest.add(size_).add(documents_).add(vocab_size_).add(bos_id_).add(eos_id_).add(tokenizer_sha256_);
  std::vector<int64_t> offsets;
  int64_t last = -1;
  for (int64_t at = 0; at <= documents_; at += kChunk) {
    offsets.resize(static_cast<size_t>(std::min(kChunk, documents_ + 1 - at)));
    file_.read_dataset("document_offsets", {at}, {static_cast<int64_t>(offsets.size())}, offsets.data());
    for (size_t i = 0; i < offsets.size(); ++i) {
      const int64_t entry = at + static_cast<int64_t>(i);
      if (entry == 0 ? offsets[i] != 0 : offsets[i] <= last)
        throw refuse("document_offsets[" + std::to_string(entry) + "] = " + std::to_string(offsets[i]) +
                     (entry == 0 ? " is not 0" : " does not exceed the one before"));
      last = offsets[i];
      if (entry % kBlock == 0) every_4096th_offset_.push_back(last);
    }
    digest.add(offsets.data(), offsets.size() * sizeof(int64_t));
  }
  if (last != size_)
    throw refuse("document_offsets end at " + std::to_string(last) + ", the file has " + std::to_string(size_) + " tokens");

  std::vector<int32_t> ids;
  for (int64_t w = 0; w < kWindows; ++w) {
    const int64_t begin = size_ / kWindows * w, n = std::min(kWindow, size_ - begin);
    ids.resize(static_cast<size_t>(n));
    read(begin, n, ids.data());
    digest.add(ids.data(), ids.size() * sizeof(int32_t));
  }
  digest_ = digest.hex();

  if (!check_ids) return;
  const int64_t limit = vocab_size_;
  for (int64_t at = 0; at < size_; at += kChunk) {
    ids.resize(static_cast<size_t>(std::min(kChunk, size_ - at)));
    read(at, static_cast<int64_t>(ids.size()), ids.data());
    for (size_t i = 0; i < ids.size(); ++i)
      if (ids[i] < 0 || ids[i] >= limit)  // below 0: a uint32 from 2^31 on
        throw refuse("token " + std::to_string(at + static_cast<int64_t>(i)) + " is " +
                     std::to_string(static_cast<uint32_t>(ids[i])) + ", its vocabulary ends at " + std::to_string(limit));
  }
}

void Hdf5Tokens::read(int64_t begin, int64_t n, int32_t* out) const { file_.read_dataset("tokens", {begin}, {n}, out); }

std::vector<int64_t> Hdf5Tokens::document_starts(int64_t begin, int64_t end) const {
  std::vector<int64_t> starts;
  begin = std::max<int64_t>(begin, 0);
  const auto& index = every_4096th_offset_;
  // The block that holds the last offset <= begin; offsets >= begin follow from there.
  int64_t block = std::upper_bound(index.begin(), index.end(), begin) - index.begin() - 1;
  std::vector<int64_t> offsets;
  for (; block < static_cast<int64_t>(index.size()) && index[static_cast<size_t>(block)] < end; ++block) {
    const int64_t first = block * kBlock, n = std::min(kBlock, documents_ - first);  // without the closing N
    if (n <= 0) break;
    offsets.resize(static_cast<size_t>(n));
    file_.read_dataset("document_offsets", {first}, {n}, offsets.data());
    starts.insert(starts.end(), std::lower_bound(offsets.begin(), offsets.end(), begin),
                  std::lower_bound(offsets.begin(), offsets.end(), end));
  }
  return starts;
}

}  // namespace dsa
