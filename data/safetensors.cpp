// Reading. Numbers in comments are the validation rules of tests/data/safetensors_test.cpp's table.
#include "data/safetensors.h"

#include <algorithm>
#include <vector>

#include "data/digest.h"
#include "data/error.h"
#include "data/strict_json.h"

namespace dsa {
namespace {

using nlohmann::json;
constexpr uint64_t kMaxHeader = 100'000'000;

struct Refuse {
  std::string path;
  InputError operator()(const std::string& why) const {
    return InputError("cannot read shard " + path, why, "the file is damaged or truncated; download or write it again");
  }
};

uint64_t unsigned_number(const json& value, const std::string& what, const Refuse& refuse) {
  if (!value.is_number_unsigned()) throw refuse(what + " is not an unsigned 64-bit integer");
  return value.get<uint64_t>();
}

TensorEntry parse_entry(const std::string& name, const json& value, const Refuse& refuse) {
  const std::string what = "tensor \"" + name + "\"";
  if (!value.is_object()) throw refuse(what + " is not an object");
  for (const auto& item : value.items())
    if (item.key() != "dtype" && item.key() != "shape" && item.key() != "data_offsets")
      throw refuse(what + " has the unknown field \"" + item.key() + "\"");
  for (const char* field : {"dtype", "shape", "data_offsets"})
    if (!value.contains(field)) throw refuse(what + " has no " + field);

  TensorEntry entry;
  entry.name = name;
  const auto dtype = value["dtype"].is_string() ? parse_dtype(value["dtype"].get<std::string>()) : std::nullopt;
  if (!dtype) throw refuse(what + " has the unknown dtype " + value["dtype"].dump());
  entry.dtype = *dtype;

  if (!value["shape"].is_array()) throw refuse(what + ": shape is not a list");
  uint64_t total_bits = static_cast<uint64_t>(bits(*dtype));
  uint64_t elements = 1;
  for (const auto& dim : value["shape"]) {
    const uint64_t n = unsigned_number(dim, what + ": a dimension", refuse);
    if (n > INT64_MAX || __builtin_mul_overflow(elements, n, &elements)) throw refuse(what + ": its size overflows 64 bits");
    entry.shape.push_back(static_cast<int64_t>(n));
  }
  if (__builtin_mul_overflow(total_bits, elements, &total_bits)) throw refuse(what + ": its size overflows 64 bits");
  if (total_bits % 8 != 0) throw refuse(what + ": its " + std::to_string(total_bits) + " bits are not whole bytes");

  const json& offsets = value["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2) throw refuse(what + ": data_offsets is not a pair");
  entry.begin = unsigned_number(offsets[0], what + ": an offset", refuse);
  entry.end = unsigned_number(offsets[1], what + ": an offset", refuse);
  if (entry.end < entry.begin) throw refuse(what + ": its data end before they begin");
  if (entry.bytes() != total_bits / 8)
    throw refuse(what + ": shape and dtype need " + std::to_string(total_bits / 8) + " bytes, data_offsets give " +
                 std::to_string(entry.bytes()));
  return entry;
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path) : file_(path) {
  const Refuse refuse{path};
  if (file_.size() < 8) throw refuse("its " + std::to_string(file_.size()) + " bytes do not hold a header length");  // 1
  unsigned char length[8];
  file_.read(0, 8, length);
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | length[i];
  if (header_bytes > kMaxHeader)
    throw refuse("a header of " + std::to_string(header_bytes) + " bytes is over the limit of 100000000");
  data_start_ = 8 + header_bytes;
  if (data_start_ > file_.size())
    throw refuse("8+N = " + std::to_string(data_start_) + " exceeds the file's " + std::to_string(file_.size()) + " bytes");

  std::string header(header_bytes, '\0');
  file_.read(8, header_bytes, header.data());
  header_digest_ = xxh3_128_hex(header);
  const size_t last = header.find_last_not_of(' ');  // 2: padded with spaces, nothing else
  if (last != std::string::npos && header[last] != '}') throw refuse("its JSON header does not end with '}'");
  const json root = parse_json_object(header, "the header of shard " + path,
                                      "the file is damaged or truncated; download or write it again", 4);  // 2, 9

  for (const auto& item : root.items()) {
    if (item.key() != "__metadata__") {
      entries_.push_back(parse_entry(item.key(), item.value(), refuse));  // 4, 6
      continue;
    }
    if (!item.value().is_object()) throw refuse("__metadata__ is not an object");  // 3
    for (const auto& pair : item.value().items()) {
      if (!pair.value().is_string()) throw refuse("__metadata__ \"" + pair.key() + "\" is not a string");
      metadata_[pair.key()] = pair.value().get<std::string>();
    }
  }
  std::sort(entries_.begin(), entries_.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end != b.end ? a.end < b.end : a.name < b.name;
  });
  uint64_t at = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {  // 5
    const TensorEntry& entry = entries_[i];
    if (entry.begin != at)
      throw refuse("tensor \"" + entry.name + "\" begins at byte " + std::to_string(entry.begin) +
                   " where the tensors before it end at " + std::to_string(at));
    at = entry.end;
    by_name_[entry.name] = i;
  }
  if (at != file_.size() - data_start_)  // 7
    throw refuse("its tensors take " + std::to_string(at) + " bytes, the file holds " +
                 std::to_string(file_.size() - data_start_));
}

const TensorEntry* SafetensorsFile::find(const std::string& name) const {
  const auto it = by_name_.find(name);
  return it == by_name_.end() ? nullptr : &entries_[it->second];
}

std::string SafetensorsFile::sampled_digest() const {
  constexpr uint64_t kWindows = 16, kWindow = 4096;
  const uint64_t data = file_.size() - data_start_, window = std::min(kWindow, data);
  std::vector<char> bytes(window);
  Digest digest;
  for (uint64_t i = 0; i < kWindows; ++i) {
    file_.read(data_start_ + (data - window) * i / (kWindows - 1), window, bytes.data());
    digest.add(bytes.data(), window);
  }
  return digest.hex();
}

void SafetensorsFile::read(const TensorEntry& entry, uint64_t offset, uint64_t bytes, void* out) const {
  if (offset > entry.bytes() || bytes > entry.bytes() - offset)
    throw std::out_of_range("read of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of tensor " +
                            entry.name + ", which has " + std::to_string(entry.bytes()));
  file_.read(data_start_ + entry.begin + offset, bytes, out);
}

}  // namespace dsa
