// What a run is: every choice a user makes, resolved, as plain values.
// The text form is recipe.proto (units and sources of every field stand there); the defaults are the member
// initialisers below. Members marked "required" have no default: load_recipe refuses a recipe without them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace dsa {

// PRETRAIN: dense attention, all parameters, no indexer. WARMUP: dense attention, only the indexers learn.
// SPARSE: attention over the indexer's top-k, all parameters learn.
enum class StageKind { PRETRAIN, WARMUP, SPARSE };
enum class Precision { FP32, BF16, FP64 };
enum class DeviceKind { AUTO, CPU, GPU };
enum class Recompute { NONE, LAYER };
enum class Moments { FP32, BF16 };
enum class MtpHidden { POST_NORM, PRE_NORM };
enum class Decay { CONSTANT, COSINE, LINEAR };

// V3.2's indexer: what a checkpoint without one gets where the recipe is silent.
inline constexpr int64_t kDefaultIndexerHeads = 64;
inline constexpr int64_t kDefaultIndexerHeadDim = 128;
inline constexpr int64_t kDefaultIndexerTopK = 2048;

struct Recipe {
  StageKind stage = StageKind::PRETRAIN;  // required

  struct Model {
    std::string config;  // path of a HuggingFace config.json; set exactly when init.random is
    struct Indexer {
      // Unset: the checkpoint's value, else the kDefaultIndexer... above. heads and head_dim may only be set
      // when the checkpoint has no indexer; top_k may also replace that of an existing one.
      std::optional<int64_t> heads, head_dim, top_k;
      bool hadamard = false;
    } indexer;
  } model;

  struct Init {
    std::string from;  // HuggingFace folder, run folder or native checkpoint; empty with random
    bool random = false;
    double std = 0.006;    // normal distribution of every new matrix (also of a new indexer)
    uint64_t seed = 1234;  // of new weights
  } init;

  struct Data {
    std::vector<std::string> tokens;  // required; laid end to end in this order
    int64_t sequence_length = 0;      // required, tokens
    bool document_mask = false;
    uint64_t seed = 1234;  // of the sample order
    int64_t held_out = 0;  // sequences at the stream's end that are never trained on
  } data;

  struct Batch {
    int64_t sequences = 0;        // required: per step, over all ranks
    int64_t micro_sequences = 1;  // per data rank and forward pass
  } batch;

  struct Optimizer {
    double lr = 0;          // required: peak, of the backbone (and of the indexers unless indexer_lr is set)
    double indexer_lr = 0;  // resolved: lr where the recipe is silent
    double beta1 = 0.9;
    double beta2 = 0.95;
    double eps = 1e-20;
    double weight_decay = 0.1;
    bool decay_norms = false;  // also decay norm weights and biases
    double clip = 1.0;         // largest gradient norm, of backbone and indexers each on its own; 0 = no clipping
    Moments moments = Moments::FP32;
    bool offload = false;  // master weights and moments in host memory
  } optimizer;

  struct Schedule {
    int64_t steps = 0;         // required
    int64_t warmup_steps = 0;  // linear from 0 to the peak
    Decay decay = Decay::CONSTANT;
    double final_lr = 0;  // lr at the last step (resolved: lr with CONSTANT); the indexers' falls by the same ratio
  } schedule;

  struct Loss {
    double kl_weight = 1.0;
    double mtp_weight = 0.1;
    double balance_alpha = 0;      // sequence-wise balance loss
    double router_bias_speed = 0;  // added to or taken from e_score_correction_bias after each step
    MtpHidden mtp_hidden = MtpHidden::POST_NORM;
  } loss;

  struct Parallel {  // data = world / (tensor * context); expert divides the world
    int64_t tensor = 1;
    int64_t context = 1;
    int64_t expert = 1;
    int64_t deadline = 1800;  // seconds to wait for another rank
  } parallel;

  struct Compute {
    Precision precision = Precision::BF16;
    Recompute recompute = Recompute::LAYER;
    int64_t query_block = 256;  // query rows of one score tile
    int threads = 0;            // per rank; 0 = all that the rank may use
    DeviceKind device = DeviceKind::AUTO;
    bool offload_hidden = false;  // recomputed layers' inputs in host memory
  } compute;

  struct Checkpoint {
    int64_t every = 100;  // steps; the last step is always saved
    int64_t keep = 2;     // newest checkpoints kept
  } checkpoint;

  struct Run {
    std::string folder;          // required: checkpoints, metrics and dashboards; a run resumes from it
    int64_t eval_every = 0;      // steps between held-out evaluations; 0 = never
    int64_t eval_sequences = 0;  // resolved: all of data.held_out where the recipe is silent
    int64_t log_every = 1;       // steps between console lines
  } run;
};

}  // namespace dsa
