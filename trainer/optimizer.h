// AdamW (Loshchilov and Hutter) with the state sharded over the ranks that hold the same parameter (ZeRO-1).
//
//   g  = sum over microbatches and ranks;   g *= min(1, clip / ||g||)      backbone and indexers each on their own
//   m  = b1 m + (1-b1) g;   v = b2 v + (1-b2) g^2
//   w -= lr ( m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + decay w )            no decay for norms and biases
//
// Parameters of one (gradient axis, group, dtype) form a bucket. In a group of n ranks each takes the rows
// rows_of(n) of every parameter, so that master weights and moments are boxes of logical tensors: a checkpoint of
// any mesh loads in any other. Master weights, moments and gradient sums are fp32 (fp64 in fp64 runs); the moments may
// be kept rounded to bf16. Everything lies on the mesh's device, or, offloaded, in host memory but for the gradients.
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
  bool bf16_moments = false;  // not in fp64 runs
  bool offload = false;       // master weights and moments in host memory, updated there
};

// This rank's boxes of the state. Their memory is `memory`, which on a CPU is the optimizer's own.
struct OptimizerState {
  std::vector<StateShard> shards;
  std::vector<at::Tensor> memory;
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

  // This rank's boxes of the master weights and both moments, copied to the host from where they lie.
  OptimizerState state() const;
  // What lies on the device, bytes: gradients, master weights and moments.
  int64_t device_bytes() const;

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
    // [ranks * length], then [length] each. A rank that is alone in its group needs one of sum and gradient at a time:
    // reduce() makes the one the other.
    at::Tensor sum, gradient, master, moment1, moment2;
  };
  template <class Body>
  static void for_each_part(const Bucket& bucket, const Body& body);
  // `host`: where the box's elements lie, laid out as the bucket's flat tensors.
  StateShard shard(const Bucket& bucket, const Piece& piece, Role role, const at::Tensor& host) const;
  void update(Bucket& bucket, int64_t first, int64_t count, double decay, double rate) const;
  void publish(Bucket& bucket) const;

  Mesh& mesh_;
  AdamOptions options_;
  std::vector<Bucket> buckets_;
  int64_t steps_ = 0;
};

}  // namespace dsa
