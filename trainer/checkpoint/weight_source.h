// Where weights come from, whatever the form: an HF folder, a native checkpoint, or a native checkpoint whose frozen
// tensors lie in the folder that it started from. Names and shapes are those of the HF release.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "data/hf_folder.h"
#include "data/model_config.h"
#include "parallel/shard.h"

namespace dsa {

class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual const ModelConfig& config() const = 0;
  virtual bool has(const std::string& name) const = 0;
  virtual std::vector<int64_t> shape(const std::string& name) const = 0;
  /// Fills `out` (contiguous, box.extent) as F32 or F64, dequantised. Throws InputError: no such tensor, another global
  /// shape, damaged bytes.
  virtual void read(const ShardSpec& box, Dtype dtype, void* out) const = 0;
  /// Throws InputError, listing all of them, when tensors that config() calls for are missing, have another shape or
  /// cannot be read; looks at headers only.
  virtual void check() const = 0;
  /// One line for people: what it is and where.
  virtual std::string describe() const = 0;
  /// The resolved folder (of a run folder: the checkpoint chosen) and its digest: what TrainingState::base_path and
  /// base_digest take.
  virtual std::string path() const = 0;
  virtual std::string digest() const = 0;
  /// The HF folder in which `name` lies as it was released (never trained since); null when it was trained.
  virtual const HfFolder* raw(const std::string& name) const = 0;
  /// The HF folder underneath it all, whose tokenizer files belong to the model; "" when there is none.
  virtual std::string hf_folder() const = 0;
  /// Of the model's tokenizer: of an HF folder's tokenizer.json, or of the tokens that a checkpoint was trained on;
  /// "" when neither says.
  virtual std::string tokenizer_sha256() const = 0;
};

/// `path`: HF folder, native checkpoint or run folder (its newest valid checkpoint). Throws InputError: none of these,
/// damaged, or a base folder that is gone or differs from the one that the checkpoint was made from.
std::unique_ptr<WeightSource> open_weights(const std::string& path);

}  // namespace dsa
