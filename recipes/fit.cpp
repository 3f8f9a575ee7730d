// Does the recipe fit the ranks, and does it fit the model?
#include <numeric>
#include <utility>

#include "recipes/checker.h"
#include "recipes/validate.h"

namespace dsa {
namespace {

bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

// What `tensor` splits: the heads, the vocabulary, and the widths of the FFNs that are not routed experts.
void check_tensor(Checker& check, const Recipe& r, const ModelFacts& model) {
  const std::pair<const char*, int64_t> split[] = {{"num_attention_heads", model.heads},
                                                   {"vocab_size", model.vocab},
                                                   {"intermediate_size", model.dense_intermediate},
                                                   {"shared experts' width", model.shared_intermediate}};
  int64_t common = 0;
  std::string undivided;
  for (const auto& [what, size] : split) {
    common = std::gcd(common, size);
    if (size % r.parallel.tensor != 0) undivided += fmt::format("{}{}={}", undivided.empty() ? "" : ", ", what, size);
  }
  if (undivided.empty()) return;
  check.add("parallel.tensor", fmt::format("{} does not divide the model's {}", check.show("parallel.tensor"), undivided),
            "legal: " + divisors(common));
}

void check_indexer(Checker& check, const Recipe& r, const ModelFacts& model) {
  const auto& indexer = r.model.indexer;
  if (r.stage == StageKind::SPARSE && !model.has_indexer) {
    check.add("stage", "stage SPARSE needs an indexer, and the checkpoint of init.from has none", "run a WARMUP stage first");
    return;
  }
  const auto fixed = [&](const char* path, const std::optional<int64_t>& said, int64_t existing) {
    if (model.has_indexer && said && *said != existing) {
      check.add(path, fmt::format("{}, but the checkpoint's indexer has {}", check.show(path), existing), "remove it");
    }
  };
  fixed("model.indexer.heads", indexer.heads, model.indexer_heads);
  fixed("model.indexer.head_dim", indexer.head_dim, model.indexer_head_dim);
  const int64_t head_dim = model.has_indexer ? model.indexer_head_dim : indexer.head_dim.value_or(kDefaultIndexerHeadDim);
  const int64_t top_k = indexer.top_k.value_or(model.has_indexer ? model.indexer_top_k : kDefaultIndexerTopK);
  if (head_dim < model.rope_dim) {
    check.add("model.indexer.head_dim", fmt::format("model.indexer.head_dim={} is below the model's qk_rope_head_dim={}",
                                                    head_dim, model.rope_dim),
              fmt::format("{} or more", model.rope_dim));
  }
  if (indexer.hadamard && !is_power_of_two(head_dim)) {
    check.add("model.indexer.hadamard", fmt::format("a Hadamard rotation of head_dim={} does not exist", head_dim),
              "head_dim must be a power of two");
  }
  if (top_k >= r.data.sequence_length) {
    check.add("model.indexer.top_k", fmt::format("model.indexer.top_k={} is not below data.sequence_length={}: nothing "
                                                 "would be left out",
                                                 top_k, r.data.sequence_length),
              fmt::format("at most {}", r.data.sequence_length - 1));
  }
}

}  // namespace

void check_world(const ResolvedRecipe& resolved, int64_t world) {
  Checker check(resolved);
  const Recipe& r = resolved.recipe;
  const std::string ranks = world == 1 ? "the 1 rank of this run" : fmt::format("the {} ranks of this run", world);
  int64_t per_replica = 0;
  const bool overflow = __builtin_mul_overflow(r.parallel.tensor, r.parallel.context, &per_replica);
  const bool mesh_fits = !overflow && world % per_replica == 0;
  if (!mesh_fits) {
    check.add(r.parallel.tensor > 1 ? "parallel.tensor" : "parallel.context",
              fmt::format("parallel.tensor={} x parallel.context={} does not divide {}", r.parallel.tensor,
                          r.parallel.context, ranks),
              fmt::format("legal products: {}; or start a multiple of {} ranks", divisors(world), per_replica));
  }
  if (world % r.parallel.expert != 0) {
    check.add("parallel.expert", fmt::format("{} does not divide {}", check.show("parallel.expert"), ranks),
              "legal: " + divisors(world));
  }
  if (mesh_fits) {
    const int64_t data = world / per_replica;
    if (r.batch.sequences % (data * r.batch.micro_sequences) != 0) {
      check.add("batch.sequences",
                fmt::format("{} does not split over {} data ranks x micro_sequences {}", check.show("batch.sequences"), data,
                            r.batch.micro_sequences),
                fmt::format("use a multiple of {}", data * r.batch.micro_sequences));
    }
  }
  check.throw_if_any();
}

void check_model(const ResolvedRecipe& resolved, const ModelFacts& model) {
  Checker check(resolved);
  const Recipe& r = resolved.recipe;

  check_tensor(check, r, model);
  if (model.experts % r.parallel.expert != 0) {
    check.add("parallel.expert", fmt::format("{} does not divide the model's n_routed_experts={}",
                                             check.show("parallel.expert"), model.experts),
              "legal: " + divisors(model.experts));
  } else if (model.experts == 0 && r.parallel.expert > 1) {
    check.add("parallel.expert", check.show("parallel.expert") + ", but the model has no routed experts", "use 1");
  }
  if (model.max_positions > 0 && r.data.sequence_length > model.max_positions) {
    check.add("data.sequence_length", fmt::format("{} exceeds the model's max_position_embeddings={}",
                                                  check.show("data.sequence_length"), model.max_positions),
              fmt::format("at most {}", model.max_positions));
  }
  if (model.mtp_layers == 0 && resolved.is_set("loss.mtp_weight") && r.loss.mtp_weight != 0 &&
      r.loss.mtp_weight != Recipe().loss.mtp_weight) {
    check.add("loss.mtp_weight", check.show("loss.mtp_weight") + " has no effect: the model has no MTP layer", "remove it");
  }
  if (r.stage != StageKind::PRETRAIN) check_indexer(check, r, model);
  check.throw_if_any();
}

}  // namespace dsa
