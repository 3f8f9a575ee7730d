#include "trainer/checkpoint/manifest.h"

#include <cstdio>
#include <cstdlib>

#include <nlohmann/json.hpp>

#include "data/digest.h"
#include "data/error.h"
#include "data/strict_json.h"

namespace dsa {
namespace {

using nlohmann::json;

constexpr const char* kFormat = "dsatrain.checkpoint";
constexpr int64_t kVersion = 1;
constexpr const char* kTail = ",\"xxh3_128\":\"";  // then 32 digits, a quote, a brace, a newline
constexpr size_t kTailBytes = 13 + 32 + 3;
constexpr int64_t kMaxElements = int64_t{1} << 48;  // of a tensor: far above any, far below overflow
constexpr Role kRoles[] = {Role::PARAM, Role::MOMENT1, Role::MOMENT2, Role::BUFFER};

// Doubles as C99 hexadecimal text: exact, and infinities and NaN survive (JSON has neither).
std::string hex_double(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%a", value);
  return text;
}

json state_json(const TrainingState& s) {
  json scalars = json::object();
  for (const auto& [key, value] : s.scalars) scalars[key] = hex_double(value);
  return {{"step", s.step},
          {"sequences_seen", s.sequences_seen},
          {"tokens_seen", s.tokens_seen},
          {"stage", s.stage},
          {"recipe_text", s.recipe_text},
          {"recipe_digest", s.recipe_digest},
          {"data_digest", s.data_digest},
          {"data_seed", s.data_seed},
          {"sequence_length", s.sequence_length},
          {"model_json", s.model_json},
          {"mesh", s.mesh},
          {"tokenizer_sha256", s.tokenizer_sha256},
          {"scalars", scalars},
          {"base_path", s.base_path},
          {"base_digest", s.base_digest},
          {"conventions", s.conventions}};
}

// Reads typed values; every complaint names the place.
struct Reader {
  std::string what;

  [[noreturn]] void refuse(const std::string& why) const {
    throw InputError(what + " is not usable", why, "take an older checkpoint");
  }
  const json& at(const json& object, const std::string& key) const {
    if (!object.is_object() || !object.contains(key)) refuse("it has no '" + key + "'");
    return object.at(key);
  }
  std::string text(const json& object, const std::string& key) const {
    const json& value = at(object, key);
    if (!value.is_string()) refuse("'" + key + "' is not a text");
    return value.get<std::string>();
  }
  int64_t integer(const json& value, const std::string& key) const {  // 0 .. 2^63 - 1
    if (!value.is_number_unsigned() || value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX))
      refuse("'" + key + "' is not a non-negative 63-bit integer: " + value.dump());
    return value.get<int64_t>();
  }
  const json& array(const json& value, const std::string& key) const {
    if (!value.is_array()) refuse("'" + key + "' is not a list");
    return value;
  }
  std::vector<int64_t> integers(const json& value, const std::string& key) const {
    std::vector<int64_t> list;
    for (const json& element : array(value, key)) list.push_back(integer(element, key));
    return list;
  }

  TrainingState state(const json& j) const {
    TrainingState s;
    s.step = integer(at(j, "step"), "step");
    s.sequences_seen = integer(at(j, "sequences_seen"), "sequences_seen");
    s.tokens_seen = integer(at(j, "tokens_seen"), "tokens_seen");
    s.stage = text(j, "stage");
    s.recipe_text = text(j, "recipe_text");
    s.recipe_digest = text(j, "recipe_digest");
    s.data_digest = text(j, "data_digest");
    if (!at(j, "data_seed").is_number_unsigned()) refuse("'data_seed' is not an unsigned integer");
    s.data_seed = at(j, "data_seed").get<uint64_t>();
    s.sequence_length = integer(at(j, "sequence_length"), "sequence_length");
    s.model_json = text(j, "model_json");
    s.mesh = text(j, "mesh");
    s.tokenizer_sha256 = text(j, "tokenizer_sha256");
    if (!at(j, "scalars").is_object()) refuse("'scalars' is not an object");
    for (const auto& [key, value] : at(j, "scalars").items()) {
      if (!value.is_string()) refuse("scalar '" + key + "' is not a text");
      const std::string digits = value.get<std::string>();
      char* end = nullptr;
      s.scalars[key] = std::strtod(digits.c_str(), &end);
      if (digits.empty() || *end != '\0') refuse("scalar '" + key + "' is not a number: " + digits);
    }
    s.base_path = text(j, "base_path");
    s.base_digest = text(j, "base_digest");
    s.conventions = text(j, "conventions");
    return s;
  }

  StoredFile file(const json& j, uint64_t block_bytes) const {
    StoredFile file;
    file.name = text(j, "name");
    if (file.name.empty() || file.name.front() == '.' || file.name.find('/') != std::string::npos)
      refuse("'" + file.name + "' is not the name of a file in this folder");
    file.hash.bytes = static_cast<uint64_t>(integer(at(j, "bytes"), "bytes"));
    file.hash.whole = text(j, "xxh3_128");
    for (const json& block : array(at(j, "blocks"), "blocks")) {
      if (!block.is_string()) refuse("'blocks' of " + file.name + " are not texts");
      file.hash.blocks.push_back(block.get<std::string>());
    }
    const uint64_t blocks = file.hash.bytes / block_bytes + (file.hash.bytes % block_bytes != 0);
    if (file.hash.blocks.size() != blocks)
      refuse(file.name + " has " + std::to_string(file.hash.blocks.size()) + " block hashes, its size needs " +
             std::to_string(blocks));
    return file;
  }

  StoredEntry entry(const json& j, const std::string& name, const std::vector<StoredFile>& files) const {
    StoredEntry entry;
    const std::optional<Dtype> dtype = parse_dtype(text(j, "dtype"));
    if (dtype != Dtype::F32 && dtype != Dtype::F64 && dtype != Dtype::BF16)
      refuse(name + " has the dtype " + text(j, "dtype") + ", known are F32, F64 and BF16");
    entry.dtype = *dtype;
    entry.shape = integers(at(j, "shape"), "shape of " + name);
    int64_t elements = 1;
    for (int64_t n : entry.shape)
      if (__builtin_mul_overflow(elements, n, &elements) || elements > kMaxElements)
        refuse("the shape of " + name + " has too many elements");
    std::vector<Box> boxes;
    for (const json& b : array(at(j, "boxes"), "boxes of " + name)) {
      if (!b.is_array() || b.size() != 4) refuse("a box of " + name + " is not [file, position, offset, extent]");
      StoredBox box;
      box.file = static_cast<size_t>(integer(b[0], "file of " + name));
      box.position = static_cast<uint64_t>(integer(b[1], "position of " + name));
      box.box = {integers(b[2], "offset of " + name), integers(b[3], "extent of " + name)};
      if (box.file >= files.size()) refuse("a box of " + name + " is in a file that is not listed");
      const size_t rank = entry.shape.size();
      bool inside = box.box.offset.size() == rank && box.box.extent.size() == rank;
      for (size_t d = 0; inside && d < rank; ++d)
        inside = box.box.extent[d] <= entry.shape[d] && box.box.offset[d] <= entry.shape[d] - box.box.extent[d];
      if (!inside) refuse("a box of " + name + " leaves its shape");
      const uint64_t bytes = static_cast<uint64_t>(numel(box.box.extent)) * bits(entry.dtype) / 8;
      const uint64_t size = files[box.file].hash.bytes;
      if (bytes > size || box.position > size - bytes)
        refuse("a box of " + name + " leaves its file " + files[box.file].name);
      boxes.push_back(box.box);
      entry.boxes.push_back(std::move(box));
    }
    const std::string hole = why_not_covered(boxes, entry.shape);
    if (!hole.empty()) refuse(name + ": " + hole);
    return entry;
  }
};

}  // namespace

std::string role_name(Role role) {
  switch (role) {
    case Role::PARAM: return "PARAM";
    case Role::MOMENT1: return "MOMENT1";
    case Role::MOMENT2: return "MOMENT2";
    case Role::BUFFER: break;
  }
  return "BUFFER";
}

std::string dataset_name(Role role, const std::string& name, const std::vector<int64_t>& offset) {
  std::string text = role_name(role) + "/" + name + "@";
  for (size_t d = 0; d < offset.size(); ++d) text += (d ? "," : "") + std::to_string(offset[d]);
  return text;
}

std::string Manifest::to_text() const {
  json files_json = json::array(), tensors = json::object();
  for (const StoredFile& file : files)
    files_json.push_back({{"name", file.name},
                          {"bytes", file.hash.bytes},
                          {"xxh3_128", file.hash.whole},
                          {"blocks", file.hash.blocks}});
  for (const auto& [role, by_name] : entries)
    for (const auto& [name, entry] : by_name) {
      json boxes = json::array();
      for (const StoredBox& b : entry.boxes) boxes.push_back({b.file, b.position, b.box.offset, b.box.extent});
      tensors[role_name(role)][name] = {{"dtype", dsa::name(entry.dtype)}, {"shape", entry.shape}, {"boxes", boxes}};
    }
  const json root = {{"format", kFormat},     {"version", kVersion}, {"block_bytes", block_bytes},
                     {"files", files_json},   {"state", state_json(state)}, {"tensors", tensors}};
  std::string text = root.dump();
  text.pop_back();  // the closing brace comes after the hash
  return text + kTail + xxh3_128_hex(text) + "\"}\n";
}

std::string manifest_digest(const std::string& text) {
  if (text.size() < kTailBytes || text.compare(text.size() - kTailBytes, 13, kTail) != 0) return "";
  return text.substr(text.size() - kTailBytes + 13, 32);
}

Manifest Manifest::from_text(const std::string& text, const std::string& what) {
  const Reader reader{what};
  const json root = parse_json_object(text, what, "take an older checkpoint", 16);
  // The version first: another version may be hashed in another way.
  if (!root.contains("format") || root.at("format") != kFormat) reader.refuse("it is not a dsatrain checkpoint");
  const int64_t version = reader.integer(reader.at(root, "version"), "version");
  if (version != kVersion)
    throw InputError(what + " has version " + std::to_string(version),
                     "this program reads version " + std::to_string(kVersion),
                     version > kVersion ? "use the newer program that wrote it" : "the version is not a legal one");
  const std::string digest = manifest_digest(text);
  if (digest.empty() || xxh3_128_hex(text.data(), text.size() - kTailBytes) != digest)
    reader.refuse("its bytes do not have the hash that it ends with: it was damaged or edited");

  Manifest manifest;
  manifest.block_bytes = static_cast<uint64_t>(reader.integer(reader.at(root, "block_bytes"), "block_bytes"));
  if (manifest.block_bytes == 0) reader.refuse("'block_bytes' is 0");
  manifest.state = reader.state(reader.at(root, "state"));
  for (const json& file : reader.array(reader.at(root, "files"), "files"))
    manifest.files.push_back(reader.file(file, manifest.block_bytes));
  const json& tensors = reader.at(root, "tensors");
  for (Role role : kRoles)
    if (tensors.contains(role_name(role)))
      for (const auto& [name, entry] : tensors.at(role_name(role)).items())
        manifest.entries[role][name] = reader.entry(entry, name, manifest.files);
  return manifest;
}

}  // namespace dsa
