// What a checkpoint holds: boxes of logical tensors (the state) and the facts beside them (TrainingState).
// Logical names are those of the HF release, one per expert and per gate / up / down projection; nothing is stored
// fused, so that any layout of ranks can be cut from any other by intersecting boxes.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "data/dtype.h"
#include "parallel/shard.h"

namespace dsa {

/// PARAM: the fp32 master weight (fp64 in fp64 runs). MOMENT1, MOMENT2: Adam's. BUFFER: the router's correction bias.
enum class Role { PARAM, MOMENT1, MOMENT2, BUFFER };

/// "PARAM", "MOMENT1", "MOMENT2", "BUFFER".
std::string role_name(Role role);

/// One box of one logical tensor in the memory of this rank: `data` is contiguous, row-major, of box.extent, and of
/// dtype F32, F64 or BF16. A box without elements is allowed and skipped. Saving only reads `data`.
struct StateShard {
  Role role = Role::PARAM;
  ShardSpec box;
  Dtype dtype = Dtype::F32;
  void* data = nullptr;
};

/// Everything about a run that is not a tensor. The texts must be UTF-8.
struct TrainingState {
  int64_t step = 0;            ///< optimizer steps done
  int64_t sequences_seen = 0;  ///< the data cursor: sequences consumed by all ranks together
  int64_t tokens_seen = 0;
  std::string stage;                       ///< PRETRAIN, WARMUP, SPARSE
  std::string recipe_text, recipe_digest;  ///< the resolved recipe
  std::string data_digest;                 ///< of the token files
  uint64_t data_seed = 0;
  int64_t sequence_length = 0;
  std::string model_json;  ///< config.json of the model, with the indexer and the MTP layers
  std::string mesh;        ///< the mesh that saved it, for people
  std::string tokenizer_sha256;
  std::map<std::string, double> scalars;  ///< learning-rate and spike-window state; stored bit for bit
  /// Frozen tensors by reference: the HF folder or checkpoint that holds what this one does not, and its digest.
  /// Both empty when the checkpoint is self-contained.
  std::string base_path, base_digest;
  std::string conventions;  ///< the indexer's rotation (half-split), Hadamard or not, ...
  bool operator==(const TrainingState&) const = default;
};

}  // namespace dsa
