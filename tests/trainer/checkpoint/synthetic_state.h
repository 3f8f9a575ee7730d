// Made-up training state for the checkpoint tests: every element's bits are a hash of (salt, role, name, index), so any
// box of any tensor can be made, and checked, by itself.
#pragma once

#include <cmath>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include <unistd.h>

#include "data/splitmix64.h"
#include "trainer/checkpoint/state_shard.h"

namespace dsa::test {

/// A folder that is removed at the end.
class TempFolder {
 public:
  explicit TempFolder(const std::string& name)
      : path_((std::filesystem::temp_directory_path() / ("dsa-" + name + "-" + std::to_string(::getpid()))).string()) {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

struct TensorKind {
  std::string name;
  std::vector<int64_t> shape;
  Role role;
  Dtype dtype;
};

inline std::vector<TensorKind> synthetic_tensors() {
  std::vector<TensorKind> kinds;
  for (Role role : {Role::PARAM, Role::MOMENT1, Role::MOMENT2}) {
    kinds.push_back({"model.embed_tokens.weight", {97, 16}, role, Dtype::F32});
    kinds.push_back({"model.layers.0.self_attn.o_proj.weight", {13, 29}, role, Dtype::F64});
    kinds.push_back({"model.layers.1.mlp.experts.3.gate_proj.weight", {8, 5, 7}, role, Dtype::BF16});
    kinds.push_back({"model.norm.weight", {31}, role, Dtype::F32});
  }
  kinds.push_back({"model.layers.1.mlp.gate.e_score_correction_bias", {8}, Role::BUFFER, Dtype::F32});
  return kinds;
}

inline int bytes_per_element(Dtype dtype) { return dtype == Dtype::F64 ? 8 : dtype == Dtype::F32 ? 4 : 2; }

/// The bytes of a box.
inline std::vector<char> make_box(const TensorKind& kind, const Box& box, uint64_t salt) {
  uint64_t seed = splitmix64(salt * 8 + static_cast<uint64_t>(kind.role));
  for (char c : kind.name) seed = splitmix64(seed + static_cast<unsigned char>(c));
  const int size = bytes_per_element(kind.dtype);
  std::vector<char> bytes(numel(box.extent) * size);
  std::vector<int64_t> at = box.offset;
  for (size_t i = 0; i < bytes.size(); i += size) {
    uint64_t index = 0;
    for (size_t d = 0; d < at.size(); ++d) index = index * kind.shape[d] + at[d];
    const uint64_t value = splitmix64(seed + index);
    std::memcpy(bytes.data() + i, &value, size);
    for (size_t d = at.size(); d-- > 0;) {
      if (++at[d] < box.offset[d] + box.extent[d]) break;
      at[d] = box.offset[d];
    }
  }
  return bytes;
}

/// Cuts a shape into about `pieces` boxes at random places along random dimensions (along rows only when asked).
inline std::vector<Box> random_boxes(const std::vector<int64_t>& shape, int pieces, bool rows_only, std::mt19937& rng) {
  std::vector<Box> boxes{{std::vector<int64_t>(shape.size(), 0), shape}};
  for (int i = 1; i < pieces; ++i) {
    const size_t which = rng() % boxes.size(), dim = rows_only ? 0 : rng() % shape.size();
    Box& first = boxes[which];
    if (first.extent[dim] < 2) continue;
    const int64_t cut = 1 + static_cast<int64_t>(rng() % (first.extent[dim] - 1));
    Box second = first;
    second.offset[dim] += cut;
    second.extent[dim] -= cut;
    first.extent[dim] = cut;
    boxes.push_back(second);
  }
  return boxes;
}

/// Shards with their memory.
struct HeldState {
  std::vector<StateShard> shards;
  std::vector<std::vector<char>> memory;
  void add(const TensorKind& kind, const Box& box, uint64_t salt) {
    memory.push_back(make_box(kind, box, salt));
    shards.push_back({kind.role, {kind.name, kind.shape, box.offset, box.extent}, kind.dtype, memory.back().data()});
  }
};

/// All tensors, whole.
inline HeldState whole_state(const std::vector<TensorKind>& kinds, uint64_t salt) {
  HeldState held;
  for (const TensorKind& kind : kinds) held.add(kind, {std::vector<int64_t>(kind.shape.size(), 0), kind.shape}, salt);
  return held;
}

inline TrainingState synthetic_facts(int64_t step) {
  TrainingState s;
  s.step = step;
  s.sequences_seen = step * 8;
  s.tokens_seen = step * 8 * 4096;
  s.stage = "SPARSE";
  s.recipe_text = "stage: SPARSE # \"quotes\", umlaut \xc3\xa4\n";
  s.recipe_digest = "abc";
  s.data_digest = "def";
  s.data_seed = 0xfedcba9876543210u;
  s.sequence_length = 4096;
  s.model_json = "{}";
  s.mesh = "data 1 context 1 tensor 1 expert 1";
  s.tokenizer_sha256 = "byte";
  s.scalars = {{"learning_rate", 0.1}, {"never", -1.0 / 3.0}, {"best_loss", HUGE_VAL}};
  s.conventions = "indexer rope half-split, no hadamard";
  return s;
}

}  // namespace dsa::test
