// Weights -> an HF folder of the release's form: names, dtypes, FP8 e4m3 in blocks of 128 x 128 with power-of-two
// scales, config.json, index. Streaming: a tensor at a time, in pieces of whole 128-row blocks.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "data/hf_folder_writer.h"
#include "trainer/checkpoint/weight_source.h"

namespace dsa {

struct ExportOptions {
  std::optional<HfFormat> format;  ///< default: V32 when the source has an indexer, else V31
  HfDtype dtype = HfDtype::FP8;
  uint64_t max_shard_bytes = kDefaultShardBytes;
};

/// Bytes written so far, bytes in all, and the tensor just done.
using ExportProgress = std::function<void(uint64_t done, uint64_t total, const std::string& tensor)>;

/// Writes `folder`, which must not exist; it appears complete or not at all. A weight that was never trained keeps its
/// stored bytes (and scales) where the target has the same dtype and its scales are powers of two; V3.1's o_proj scales
/// are not, so o_proj is requantised. V31 leaves the indexer out; V32 without an indexer in the source is an InputError.
void export_checkpoint(const WeightSource& source, const std::string& folder, const ExportOptions& options,
                       const ExportProgress& progress = {});

}  // namespace dsa
