// AdamW (Loshchilov and Hutter) with the state sharded over the ranks that hold the same parameter (ZeRO-1).
//
//   g  = sum over microbatches and ranks;   g *= min(1, clip / ||g||)      backbone and indexers each on their own
//   m  = b1 m + (1-b1) g;   v = b2 v + (1-b2) g^2
//   w -= lr ( m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + decay w )            no decay for norms and biases
//
// Parameters of one (gradient axis, group, dtype) form a bucket. In a group of n ranks each takes the rows
// rows_of(n) of every parameter, so that master weights and moments are boxes of logical tensors: a checkpoint of
// any mesh loads in any other. Master weights, moments and gradient sums are fp32 (fp64 in fp64 runs).
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "parallel/mesh.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/state_shard.h"
#include "trainer/initialise.h"
#include "trainer/model/parameter.h"

namespace dsa {

struct AdamOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-20, weight_decay = 0.1;
  bool decay_norms = false;
  double clip = 1.0;  // of each group; 0 = no clipping
};

struct GradientNorms {
  double backbone = 0, indexer = 0;  // before clipping
  bool finite() const;
};

class ShardedAdamW {
 public:
  // Covers the parameters that require a gradient now. Collective.
  ShardedAdamW(ParameterList& parameters, Mesh& mesh, const AdamOptions& options);

  // Adds each parameter's .grad to the sums and clears it: call after every microbatch.
  void accumulate();
  // Sums over ranks and returns the norms, the same on all ranks. Collective; clears the sums.
  GradientNorms reduce();
  // Uses what reduce() left. Updates master weights, then every rank's parameters. Collective.
  void step(const GradientNorms& norms, double lr, double indexer_lr);

  // Fills the master weights (each rank reads its shard only), then the parameters. Collective.
  void initialise(const InitialWeights& weights);
  // From a checkpoint of any mesh; `progress` hears the bytes read. Collective.
  void load(const CheckpointReader& checkpoint, const std::function<void(int64_t)>& progress);

  // This rank's boxes of the master weights and both moments. The memory stays this object's.
  std::vector<StateShard> state() const;

  int64_t steps() const { return steps_; }
  void set_steps(int64_t steps) { steps_ = steps; }
  // What reduce() left, put together from the ranks that share a parameter: the gradient of each parameter's value
  // as this rank holds it. For `probe` and tests. Collective.
  std::vector<std::pair<const Parameter*, at::Tensor>> gradients() const;

 private:
  struct Piece {  // one logical tensor (or this rank's part of it)
    const Parameter* parameter;
    size_t index;                  // of the shard in parameter->shards
    std::vector<int64_t> offset;   // by rank of the group: first element in that rank's part of the flat buffer
    std::vector<Rows> rows;        // by rank of the group: which rows of the piece
    int64_t row_elements;
  };
  struct Bucket {
    Communicator* group;
    ParameterGroup kind;
    at::ScalarType dtype;
    std::vector<Piece> pieces;         // decayed ones first
    int64_t length = 0, decayed = 0;   // of one rank's part; of this rank's decayed elements
    at::Tensor sum, gradient, master, moment1, moment2;  // [ranks * length], then [length] each
  };
  StateShard shard(const Bucket& bucket, const Piece& piece, Role role, const at::Tensor& flat) const;
  void publish(Bucket& bucket) const;

  Mesh& mesh_;
  AdamOptions options_;
  std::vector<Bucket> buckets_;
  int64_t steps_ = 0;
};

}  // namespace dsa
