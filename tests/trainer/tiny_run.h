// Small runs for tests: a scratch folder that all ranks share, a token file, a model config with an MTP layer, and
// recipes for the three stages over them. Sequence 64, top-k 16.
#pragma once

#include <string>
#include <vector>

#include "parallel/mesh.h"
#include "recipes/load.h"

namespace dsa::test {

constexpr int64_t kSequence = 64, kTopK = 16;

// A fresh folder, the same on all ranks of `world`; removed when the objects of all ranks go.
class Scratch {
 public:
  explicit Scratch(Communicator& world);
  ~Scratch();
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
  Communicator& world_;
};

// tokens.h5 (documents of 5 to 90 tokens, vocabulary 512) and config.json (golden hf_v31_tiny with one MTP layer).
// Call on one rank.
void write_inputs(const Scratch& scratch);

// stage: PRETRAIN (random weights), WARMUP, SPARSE; from: a folder for the last two. fp64, 4 sequences a step, Adam eps
// 1e-6: the update of an element whose gradient is rounding noise stays far below the tolerance of 1e-10.
ResolvedRecipe recipe(const Scratch& scratch, const std::string& stage, const std::string& from, const std::string& folder,
                      std::vector<std::string> sets = {});

}  // namespace dsa::test
