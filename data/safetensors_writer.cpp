#include <algorithm>
#include <stdexcept>

#include "data/error.h"
#include "data/safetensors.h"
#include "data/strict_json.h"

namespace dsa {

uint64_t tensor_bytes(Dtype dtype, const std::vector<int64_t>& shape) {
  uint64_t total = static_cast<uint64_t>(bits(dtype));
  for (int64_t n : shape)
    if (n < 0 || __builtin_mul_overflow(total, static_cast<uint64_t>(n), &total))
      throw std::invalid_argument("a tensor's size is negative or overflows 64 bits");
  if (total % 8 != 0) throw std::invalid_argument("a tensor's bits are not whole bytes");
  return total / 8;
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<TensorInfo> tensors,
                                     std::map<std::string, std::string> metadata, bool overwrite)
    : path_(path), overwrite_(overwrite) {
  if (!overwrite && path_exists(path))
    throw InputError("cannot write " + path, "it exists already", "choose another name or remove that file first");
  std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return a.dtype != b.dtype ? a.dtype > b.dtype : a.name < b.name;
  });

  // Entry by entry, because a json object would sort the names: the header lists tensors in data order.
  std::string header = "{";
  if (!metadata.empty()) header += "\"__metadata__\":" + nlohmann::json(metadata).dump();
  uint64_t at = 0;
  for (const TensorInfo& tensor : tensors) {
    const TensorEntry entry{tensor.name, tensor.dtype, tensor.shape, at, at + tensor_bytes(tensor.dtype, tensor.shape)};
    at = entry.end;
    if (header.size() > 1) header += ",";
    header += nlohmann::json(tensor.name).dump() + ":{\"dtype\":\"" + name(tensor.dtype) +
              "\",\"shape\":" + nlohmann::json(tensor.shape).dump() + ",\"data_offsets\":[" +
              std::to_string(entry.begin) + "," + std::to_string(entry.end) + "]}";
    if (tensor.name == "__metadata__" || !slots_.emplace(tensor.name, Slot{entry, {}}).second)
      throw std::invalid_argument("two tensors are called " + tensor.name);
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  data_start_ = 8 + header.size();
  missing_bytes_ = at;

  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(header.size() >> (8 * i));
  file_ = std::make_unique<TempFile>(path);
  file_->write(0, length, 8);
  file_->write(8, header.data(), header.size());
  file_->resize(data_start_ + at);
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(const std::string& name, uint64_t offset, const void* bytes, uint64_t n) {
  const auto found = slots_.find(name);
  if (found == slots_.end()) throw std::invalid_argument("tensor " + name + " is not in the plan of " + path_);
  Slot& slot = found->second;
  if (offset > slot.entry.bytes() || n > slot.entry.bytes() - offset)
    throw std::out_of_range("write of " + std::to_string(n) + " bytes at " + std::to_string(offset) + " of tensor " +
                            name + ", which has " + std::to_string(slot.entry.bytes()));
  if (n == 0) return;
  const auto next = slot.written.upper_bound(offset);
  if (next != slot.written.end() && next->first < offset + n)
    throw std::logic_error("bytes of tensor " + name + " written twice");
  auto piece = slot.written.end();
  if (next != slot.written.begin()) {
    const auto before = std::prev(next);
    if (before->second > offset) throw std::logic_error("bytes of tensor " + name + " written twice");
    if (before->second == offset) {
      before->second += n;
      piece = before;
    }
  }
  if (piece == slot.written.end()) piece = slot.written.emplace(offset, offset + n).first;
  if (next != slot.written.end() && next->first == piece->second) {
    piece->second = next->second;
    slot.written.erase(next);
  }
  file_->write(data_start_ + slot.entry.begin + offset, bytes, n);
  missing_bytes_ -= n;
}

void SafetensorsWriter::write(const std::string& name, const void* bytes) {
  const auto found = slots_.find(name);
  if (found == slots_.end()) throw std::invalid_argument("tensor " + name + " is not in the plan of " + path_);
  write(name, 0, bytes, found->second.entry.bytes());
}

void SafetensorsWriter::commit() {
  if (missing_bytes_ != 0)
    throw std::logic_error(path_ + ": " + std::to_string(missing_bytes_) + " bytes were never written");
  file_->publish(overwrite_);
  file_.reset();
}

}  // namespace dsa
