#include "recipes/validate.h"

#include "recipes/checker.h"

namespace dsa {
namespace {

const char* name(StageKind stage) {
  switch (stage) {
    case StageKind::PRETRAIN: return "PRETRAIN";
    case StageKind::WARMUP: return "WARMUP";
    case StageKind::SPARSE: return "SPARSE";
  }
  return "";
}

void check_ranges(Checker& check, const Recipe& r) {
  const auto& indexer = r.model.indexer;
  if (indexer.heads) check.at_least<int64_t>("model.indexer.heads", *indexer.heads, 1);
  if (indexer.head_dim) check.at_least<int64_t>("model.indexer.head_dim", *indexer.head_dim, 1);
  if (indexer.top_k) check.at_least<int64_t>("model.indexer.top_k", *indexer.top_k, 1);
  check.above_zero("init.std", r.init.std);
  check.at_least<int64_t>("data.held_out", r.data.held_out, 0);
  check.at_least<int64_t>("batch.micro_sequences", r.batch.micro_sequences, 1);
  check.below_one("optimizer.beta1", r.optimizer.beta1);
  check.below_one("optimizer.beta2", r.optimizer.beta2);
  check.at_least("optimizer.eps", r.optimizer.eps, 0.0);
  check.at_least("optimizer.weight_decay", r.optimizer.weight_decay, 0.0);
  check.at_least("optimizer.clip", r.optimizer.clip, 0.0);
  check.at_least<int64_t>("schedule.warmup_steps", r.schedule.warmup_steps, 0);
  check.at_least("loss.kl_weight", r.loss.kl_weight, 0.0);
  check.at_least("loss.mtp_weight", r.loss.mtp_weight, 0.0);
  check.at_least("loss.balance_alpha", r.loss.balance_alpha, 0.0);
  check.at_least("loss.router_bias_speed", r.loss.router_bias_speed, 0.0);
  check.at_least<int64_t>("parallel.tensor", r.parallel.tensor, 1);
  check.at_least<int64_t>("parallel.context", r.parallel.context, 1);
  check.at_least<int64_t>("parallel.expert", r.parallel.expert, 1);
  check.at_least<int64_t>("parallel.deadline", r.parallel.deadline, 1);
  check.at_least<int64_t>("compute.query_block", r.compute.query_block, 1);
  check.at_least("compute.threads", r.compute.threads, 0);
  check.at_least<int64_t>("checkpoint.every", r.checkpoint.every, 1);
  check.at_least<int64_t>("checkpoint.keep", r.checkpoint.keep, 2);  // the older one serves when the newest is damaged
  check.at_least<int64_t>("run.eval_every", r.run.eval_every, 0);
  check.at_least<int64_t>("run.eval_sequences", r.run.eval_sequences, 0);
  check.at_least<int64_t>("run.log_every", r.run.log_every, 1);
}

// Those without a default (absent is find_missing's affair), and those whose default is another field.
void check_required_ranges(Checker& check, const ResolvedRecipe& resolved) {
  const Recipe& r = resolved.recipe;
  if (resolved.is_set("data.sequence_length")) check.at_least<int64_t>("data.sequence_length", r.data.sequence_length, 2);
  if (resolved.is_set("batch.sequences")) check.at_least<int64_t>("batch.sequences", r.batch.sequences, 1);
  if (resolved.is_set("schedule.steps")) check.at_least<int64_t>("schedule.steps", r.schedule.steps, 1);
  if (resolved.is_set("optimizer.lr")) check.above_zero("optimizer.lr", r.optimizer.lr);
  if (resolved.is_set("optimizer.indexer_lr")) check.at_least("optimizer.indexer_lr", r.optimizer.indexer_lr, 0.0);
  if (resolved.is_set("schedule.final_lr")) check.at_least("schedule.final_lr", r.schedule.final_lr, 0.0);
  int64_t sequences = 0, tokens = 0;
  if (__builtin_mul_overflow(r.schedule.steps, r.batch.sequences, &sequences) ||
      __builtin_mul_overflow(sequences, r.data.sequence_length, &tokens)) {
    check.add("schedule.steps", "steps x sequences x sequence_length exceeds 2^63 tokens", "one of the three is mistyped");
  }
  for (const std::string& path : r.data.tokens) {
    if (path.empty()) check.add("data.tokens", "data.tokens holds an empty path", "name a token file");
  }
}

void check_schedule(Checker& check, const Recipe& r) {
  if (r.schedule.steps > 0 && r.schedule.warmup_steps > r.schedule.steps) {
    check.add("schedule.warmup_steps", fmt::format("{} exceeds {}", check.show("schedule.warmup_steps"),
                                                   check.show("schedule.steps")),
              fmt::format("at most {}", r.schedule.steps));
  }
  if (r.optimizer.lr > 0 && r.schedule.decay == Decay::CONSTANT && r.schedule.final_lr != r.optimizer.lr) {
    check.add("schedule.final_lr", check.show("schedule.final_lr") + " has no effect with schedule.decay=CONSTANT",
              "remove it, or set decay: COSINE or LINEAR");
  } else if (r.optimizer.lr > 0 && r.schedule.final_lr > r.optimizer.lr) {
    check.add("schedule.final_lr", fmt::format("{} exceeds {}", check.show("schedule.final_lr"), check.show("optimizer.lr")),
              "a decay ends below the peak");
  }
}

void check_optimizer(Checker& check, const Recipe& r) {
  if (r.optimizer.moments == Moments::BF16 && r.compute.precision == Precision::FP64)
    check.add("optimizer.moments", check.show("optimizer.moments") + " contradicts " + check.show("compute.precision"),
              "remove it: fp64 runs keep fp64 moments");
}

void check_compute(Checker& check, const Recipe& r) {
  const std::string path = "compute.offload_hidden";
  const auto no_effect_with = [&](const char* other, const char* fix) {
    check.add(path, check.show(path) + " has no effect with " + check.show(other), fix);
  };
  if (!r.compute.offload_hidden) return;
  if (r.compute.recompute == Recompute::NONE) no_effect_with("compute.recompute", "remove it, or set recompute: LAYER");
  if (r.compute.device == DeviceKind::CPU)
    no_effect_with("compute.device", "remove it: everything lies in host memory");
}

void check_batch(Checker& check, const Recipe& r) {
  if (r.batch.sequences > 0 && r.batch.micro_sequences > 0 && r.batch.sequences % r.batch.micro_sequences != 0) {
    check.add("batch.micro_sequences", fmt::format("{} does not divide {}", check.show("batch.micro_sequences"),
                                                   check.show("batch.sequences")),
              "legal: " + divisors(r.batch.sequences));
  }
  const int64_t tensor = r.parallel.tensor, context = r.parallel.context, length = r.data.sequence_length;
  int64_t pieces = 0;
  if (tensor >= 1 && context >= 1 && length >= 2) {
    const bool overflow = __builtin_mul_overflow(tensor == 1 && context == 1 ? 1 : 2 * context, tensor, &pieces);
    if (overflow || length % pieces != 0) {
      check.add("data.sequence_length", fmt::format("{} does not split into 2 x context x tensor = {} equal parts",
                                                    check.show("data.sequence_length"), pieces),
                fmt::format("use a multiple of {}", pieces));
    }
  }
}

void check_evaluation(Checker& check, const Recipe& r) {
  if (r.run.eval_every > 0 && r.data.held_out == 0) {
    check.add("run.eval_every", check.show("run.eval_every") + " needs held-out sequences, and data.held_out is 0",
              "set data.held_out");
  } else if (r.data.held_out > 0 && r.run.eval_sequences > r.data.held_out) {
    check.add("run.eval_sequences", fmt::format("{} exceeds {}", check.show("run.eval_sequences"), check.show("data.held_out")),
              fmt::format("at most {}", r.data.held_out));
  } else if (r.run.eval_every > 0 && r.run.eval_sequences == 0) {
    check.add("run.eval_sequences", check.show("run.eval_sequences") + " evaluates nothing", "1 or more");
  }
}

void check_start(Checker& check, const Recipe& r) {
  if (r.init.random && !r.init.from.empty()) {
    check.add("init.random", "init.random and init.from are both set", "keep one");
    return;
  }
  if (r.init.random && r.stage != StageKind::PRETRAIN) {
    check.add("init.random", fmt::format("stage {} starts from a trained model, not from random weights", name(r.stage)),
              "set init.from instead");
  }
  if (!r.init.from.empty() && !r.model.config.empty()) {
    check.add("model.config", "model.config has no effect with init.from, which brings its own", "remove it");
  }
}

// Settings that the stage would silently ignore.
void check_effect(Checker& check, const ResolvedRecipe& resolved) {
  const Recipe& r = resolved.recipe;
  const Recipe defaults;
  const auto ignored = [&](const char* path, bool differs) {
    if (!differs) return;
    check.add(path, fmt::format("{} has no effect in stage {}", check.show(path), name(r.stage)), "remove it");
  };
  if (r.stage == StageKind::PRETRAIN && resolved.is_set("stage")) {
    ignored("model.indexer.heads", r.model.indexer.heads.has_value());
    ignored("model.indexer.head_dim", r.model.indexer.head_dim.has_value());
    ignored("model.indexer.top_k", r.model.indexer.top_k.has_value());
    ignored("model.indexer.hadamard", r.model.indexer.hadamard);
    ignored("optimizer.indexer_lr", r.optimizer.indexer_lr != r.optimizer.lr);
    ignored("loss.kl_weight", r.loss.kl_weight != defaults.loss.kl_weight);
  }
  if (r.stage == StageKind::WARMUP) {
    ignored("compute.offload_hidden", r.compute.offload_hidden);
    ignored("loss.mtp_weight", r.loss.mtp_weight != defaults.loss.mtp_weight);
    ignored("loss.balance_alpha", r.loss.balance_alpha != defaults.loss.balance_alpha);
    ignored("loss.router_bias_speed", r.loss.router_bias_speed != defaults.loss.router_bias_speed);
  }
}

}  // namespace

std::vector<Problem> find_out_of_range(const ResolvedRecipe& resolved) {
  Checker check(resolved);
  check_ranges(check, resolved.recipe);
  check_required_ranges(check, resolved);
  return check.take();
}

std::vector<Problem> find_contradictions(const ResolvedRecipe& resolved, const std::set<std::string>& unread) {
  Checker check(resolved);
  if (!unread.contains("schedule.decay")) check_schedule(check, resolved.recipe);
  check_batch(check, resolved.recipe);
  check_optimizer(check, resolved.recipe);
  check_compute(check, resolved.recipe);
  if (!unread.contains("data.held_out")) check_evaluation(check, resolved.recipe);
  check_start(check, resolved.recipe);
  if (!unread.contains("stage")) check_effect(check, resolved);
  return check.take();
}

std::vector<Problem> find_missing(const ResolvedRecipe& resolved) {
  const Recipe& r = resolved.recipe;
  Checker check(resolved);
  const auto need = [&](const char* path, bool there, const char* fix) {
    if (!there) check.add(path, fmt::format("{} is not set", path), fix);
  };
  need("stage", resolved.is_set("stage"), "write stage: PRETRAIN, WARMUP or SPARSE");
  need("data.tokens", !r.data.tokens.empty(), "write data { tokens: \"FILE.h5\" }");
  need("data.sequence_length", resolved.is_set("data.sequence_length"), "write data { sequence_length: ... }");
  need("batch.sequences", resolved.is_set("batch.sequences"), "write batch { sequences: ... }, per step over all ranks");
  need("optimizer.lr", resolved.is_set("optimizer.lr"), "write optimizer { lr: ... }");
  need("schedule.steps", resolved.is_set("schedule.steps"), "write schedule { steps: ... }");
  need("run.folder", !r.run.folder.empty(), "write run { folder: \"runs/NAME\" }");
  if (r.schedule.decay != Decay::CONSTANT && !resolved.is_set("schedule.final_lr")) {
    check.add("schedule.decay", "schedule.final_lr is not set, and " + check.show("schedule.decay") + " needs it",
              "write schedule { final_lr: ... }");
  }
  if (!r.init.random && r.init.from.empty()) {
    check.add("init.from", "neither init.from nor init.random is set",
              "write init { from: \"FOLDER\" }, or init { random: true } to start from nothing");
  }
  if (r.init.random && r.model.config.empty()) {
    check.add("init.random", "model.config is not set, and init.random needs it",
              "write model { config: \"config.json\" }");
  }
  return check.take();
}

}  // namespace dsa
