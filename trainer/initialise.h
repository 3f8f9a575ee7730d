// First values of parameters: from a checkpoint in any form, else random where the recipe allows it.
//
//   matrix ~ N(0, std^2), one number per (seed, tensor name, element): the same for every mesh
//   norm weight = 1, bias = 0, router correction bias = 0
#pragma once

#include <functional>
#include <memory>

#include "trainer/checkpoint/weight_source.h"
#include "trainer/model/parameter.h"

namespace dsa {

class InitialWeights {
 public:
  // source may be null: everything random. With a source only what it can lack is random (the indexer of a V3.1
  // checkpoint, when random_indexer); anything else missing throws InputError.
  // `progress` hears the bytes filled, as they stand in memory.
  InitialWeights(std::shared_ptr<const WeightSource> source, bool random_indexer, double std, uint64_t seed,
                 std::function<void(int64_t)> progress = {});

  // Fills `out` (contiguous, box.extent; F32 or F64).
  void read(const ShardSpec& box, Dtype dtype, void* out) const;
  // Parameters that no optimizer covers (frozen ones), and all buffers.
  void fill(ParameterList& list, bool frozen_only) const;

 private:
  std::shared_ptr<const WeightSource> source_;
  bool random_indexer_;
  double std_;
  uint64_t seed_;
  std::function<void(int64_t)> progress_;
};

// "model.layers.3.self_attn.indexer.wk.weight" and the like.
bool is_indexer_tensor(const std::string& name);

}  // namespace dsa
