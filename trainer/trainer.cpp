#include "trainer/trainer.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <map>
#include <utility>

#include "data/hf_names.h"
#include "kernels/native.h"
#include "parallel/device.h"
#include "recipes/validate.h"
#include "trainer/checkpoint/run_lock.h"
#include "trainer/checkpoint/save.h"
#include "trainer/device_memory.h"
#include "trainer/initialise.h"
#include "trainer/lr_schedule.h"
#include "trainer/metrics/progress.h"
#include "trainer/router_bias.h"
#include "trainer/run_failure.h"
#include "trainer/stage.h"
#include "trainer/step_summary.h"

namespace dsa {
namespace {

constexpr int64_t kMaxSkippedInARow = 5, kMaxFailedSaves = 3;

volatile std::sig_atomic_t stop_requested = 0;
void request_stop(int) { stop_requested = 1; }

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

const char* name(Precision p) { return p == Precision::FP64 ? "fp64" : p == Precision::BF16 ? "bf16" : "fp32"; }

at::ScalarType dtype_of(Precision p) {
  return p == Precision::FP64 ? at::kDouble : p == Precision::BF16 ? at::kBFloat16 : at::kFloat;
}

AdamOptions adam_options(const Recipe::Optimizer& o) {
  return {o.beta1, o.beta2, o.eps, o.weight_decay, o.decay_norms, o.clip, o.moments == Moments::BF16, o.offload};
}

// Waits for what was queued on a GPU, so that host clocks mean something.
void synchronise(at::Device device) {
  if (!device.is_cpu()) c10::impl::getDeviceGuardImpl(device.type())->synchronizeDevice(device.index());
}

// Of this rank: the GPU, or the cores that it may use.
std::string describe_device(at::Device device) {
  cpu_set_t visible;
  CPU_ZERO(&visible);
  sched_getaffinity(0, sizeof visible, &visible);
  return fmt::format("{}, {} threads on {} visible cores", device.is_cpu() ? "CPU" : describe_gpu(device), at::get_num_threads(),
                     CPU_COUNT(&visible));
}

// What computed each operation of the steps so far.
std::string implementations() {
  std::string text = "  ops     ";
  const char* separator = "";
  for (const auto& [op, implementation] : implementations_that_ran()) {
    text += std::exchange(separator, ", ") + op + ": " + implementation;
  }
  return text;
}

}  // namespace

template <class Work>
auto Trainer::within_memory(const std::string& activity, const Work& work) {
  try {
    return work();
  } catch (const c10::OutOfMemoryError& e) {
    MemoryUse use{activity, 0, optimizer_ ? optimizer_->device_bytes() : 0, peak_memory_bytes(mesh_.device())};
    for (const Parameter& p : model_.parameters().parameters) use.parameter_bytes += static_cast<int64_t>(p.value.nbytes());
    throw out_of_memory(e.what_without_backtrace(), use, recipe_);
  }
}

Trainer::Trainer(const ResolvedRecipe& recipe, Mesh& mesh)
    : resolved_(recipe),
      recipe_(resolved_.recipe),
      mesh_(mesh),
      start_(find_starting_point(resolved_, mesh)),
      dataset_(open_dataset(recipe_, start_.config, mesh.rank() == 0 && !start_.resume)),
      tokenizer_(check_tokenizer(start_, *dataset_)),
      loader_(*dataset_, recipe_, mesh.coordinates().data, mesh.layout().degrees().data),
      model_(start_.config, {dtype_of(recipe_.compute.precision), recipe_.model.indexer.hadamard,
                             recipe_.loss.mtp_hidden == MtpHidden::PRE_NORM}, mesh),
      born_(now()) {
  if (start_.resume) check_continues(*start_.resume, recipe_, start_.config, *dataset_);
  // Also a barrier: every rank has checked everything before the folder is touched.
  const std::vector<std::string> devices = mesh_.along(Axis::WORLD).all_gather_text(describe_device(mesh_.device()));
  if (mesh_.rank() == 0) {
    lock_ = std::make_unique<RunLock>(recipe_.run.folder);
    console_ = std::make_unique<Console>(stdout, recipe_.run.log_every);
    announce(devices);
  }
  model_.parameters().set_trainable(ParameterGroup::BACKBONE, recipe_.stage != StageKind::WARMUP);
  model_.parameters().set_trainable(ParameterGroup::INDEXER, true);
  optimizer_ = within_memory("setting up", [&] {
    return std::make_unique<ShardedAdamW>(model_.parameters(), mesh_, adam_options(recipe_.optimizer));
  });
  std::optional<Progress> loading;
  if (mesh_.rank() == 0) loading.emplace("load", 0, "bytes");
  const auto loaded = [&](int64_t bytes) { if (loading) loading->add(bytes); };
  const InitialWeights weights(start_.source, start_.random_indexer, recipe_.init.std, recipe_.init.seed, loaded);
  weights.fill(model_.parameters(), /*frozen_only=*/true);
  if (start_.resume) {
    const TrainingState& state = start_.resume->state();
    optimizer_->load(*start_.resume, loaded);
    done_ = state.step;
    skipped_ = static_cast<int64_t>(state.scalars.at("skipped"));
    optimizer_->set_steps(done_ - skipped_);
    last_checkpoint_ = start_.resume->path();
  } else {
    optimizer_->initialise(weights);
  }
  if (mesh_.rank() == 0) metrics_ = std::make_unique<MetricsWriter>(recipe_.run.folder, done_ + 1);
}

Trainer::~Trainer() = default;

StepReport Trainer::step(int64_t number) {
  const double begin = now();
  // 1 the batch: a pure function of the step
  const Microbatches batches = loader_.training(number);
  const double loaded = now();
  const std::vector<int64_t> targets = global_targets(batches, start_.config.num_nextn_predict_layers, mesh_);
  const StagePlan plan = plan_step(recipe_, start_.config, targets[0]);

  // 2, 3 forward and backward; the indexers' gradients come on the way (indexer_loss.h)
  ModelReport report = model_.report();
  for (const auto& samples : batches) {
    const TokenBatch batch = make_batch(samples, start_.config, mesh_, model_.options().dtype);
    const at::Tensor loss = model_.forward({batch, plan, report});
    if (loss.defined()) loss.backward();
    optimizer_->accumulate();
  }

  // 4, 5 sums over ranks, norms; all ranks agree whether the step counts
  const GradientNorms norms = optimizer_->reduce();
  const bool counts = norms.finite();
  skipped_ += !counts;
  skipped_in_a_row_ = counts ? 0 : skipped_in_a_row_ + 1;

  // 6 update
  const double factor = lr_factor(recipe_.schedule, recipe_.optimizer.lr, number);
  if (counts) optimizer_->step(norms, recipe_.optimizer.lr * factor, recipe_.optimizer.indexer_lr * factor);
  if (counts && plan.train_backbone)
    update_router_bias(model_.parameters(), report, recipe_.loss.router_bias_speed, mesh_);
  done_ = number;

  // 7 report
  StepReport result = summarise(report, targets, norms, recipe_, start_.config, mesh_);
  const int64_t tokens = recipe_.batch.sequences * recipe_.data.sequence_length;
  result.step = number;
  if (plan.train_backbone) result.lr = recipe_.optimizer.lr * factor;
  if (plan.train_indexer) result.indexer_lr = recipe_.optimizer.indexer_lr * factor;
  result.skipped_total = skipped_;
  result.tokens_total = number * tokens;
  result.data_seconds = loaded - begin;
  synchronise(mesh_.device());
  result.step_seconds = now() - begin;
  result.tokens_per_second = static_cast<double>(tokens) / result.step_seconds;
  return result;
}

double Trainer::held_out_loss() {
  const StagePlan plan = plan_evaluation(recipe_);
  double sum = 0, count = 0;
  for (const auto& samples : loader_.held_out(recipe_.run.eval_sequences)) {
    ModelReport report = model_.report();
    const TokenBatch batch = make_batch(samples, start_.config, mesh_, model_.options().dtype);
    model_.forward({batch, plan, report});
    sum += report.lm_loss;
    // Context ranks hold parts of the loss, each data rank counts its sequences once.
    if (mesh_.coordinates().context == 0) count += static_cast<double>(count_targets(samples, 0)[0]);
  }
  const std::vector<double> total = sum_over(mesh_.along(Axis::REPLICA), {sum, count});
  return total[0] / total[1];
}

void Trainer::save(int64_t number) {
  TrainingState state;
  state.step = number;
  state.sequences_seen = number * recipe_.batch.sequences;
  state.tokens_seen = state.sequences_seen * recipe_.data.sequence_length;
  state.stage = stage_name(recipe_.stage);
  state.recipe_text = resolved_.text;
  state.recipe_digest = resolved_.digest;
  state.data_digest = dataset_->digest();
  state.data_seed = recipe_.data.seed;
  state.sequence_length = recipe_.data.sequence_length;
  state.model_json = start_.config.to_json(start_.config.format(), HfDtype::BF16);
  const Degrees& d = mesh_.layout().degrees();
  state.mesh = "data " + std::to_string(d.data) + ", context " + std::to_string(d.context) + ", tensor " +
               std::to_string(d.tensor) + ", expert " + std::to_string(d.expert);
  state.tokenizer_sha256 = dataset_->tokenizer_sha256();
  state.scalars["skipped"] = static_cast<double>(skipped_);
  state.base_path = start_.base_path;
  state.base_digest = start_.base_digest;
  state.conventions = std::string("indexer rope half-split, hadamard ") + (recipe_.model.indexer.hadamard ? "yes" : "no");

  OptimizerState tensors = optimizer_->state();
  if (start_.base_path.empty() && mesh_.rank() == 0)
    for (const Buffer& b : model_.parameters().buffers) {
      tensors.memory.push_back(b.value.cpu());
      tensors.shards.push_back({Role::BUFFER, whole(b.name, {b.value.numel()}),
                                b.value.scalar_type() == at::kDouble ? Dtype::F64 : Dtype::F32,
                                tensors.memory.back().data_ptr()});
    }
  std::optional<Progress> saving;
  if (mesh_.rank() == 0) saving.emplace("save", 0, "bytes");
  const SaveResult result = save_checkpoint(recipe_.run.folder, state, tensors.shards, mesh_.along(Axis::WORLD),
                                            static_cast<int>(recipe_.checkpoint.keep),
                                            [&](uint64_t bytes) { if (saving) saving->add(static_cast<int64_t>(bytes)); });
  saving.reset();
  checkpoint_seconds_ += result.seconds;
  failed_saves_ = result.committed ? 0 : failed_saves_ + 1;
  checkpoint_note_ = std::to_string(number) + (result.committed ? " ok" : " failed");
  if (result.committed) last_checkpoint_ = result.path;
  if (!result.committed && console_) console_->line("checkpoint failed: " + result.error);
  if (failed_saves_ >= kMaxFailedSaves)
    throw RunFailure(kExitCannotCheckpoint, "cannot save checkpoints (" + std::to_string(failed_saves_) +
                                                " failures in a row, the last: " + result.error + ") free the disk and run again");
}

void Trainer::run() {
  std::signal(SIGUSR1, request_stop);
  std::signal(SIGTERM, request_stop);
  Communicator& world = mesh_.along(Axis::WORLD);
  const auto evaluate = [&] { return within_memory("the held-out evaluation", [&] { return held_out_loss(); }); };
  std::optional<double> before;
  if (recipe_.run.eval_every > 0 && done_ == 0) before = evaluate();
  if (before && console_) console_->line(fmt::format("  start   held-out {:.4f}", *before));
  const int64_t first = done_ + 1;
  while (done_ < recipe_.schedule.steps) {
    const int64_t number = done_ + 1;
    StepReport report = within_memory(fmt::format("step {}", number), [&] { return step(number); });
    const bool last = number == recipe_.schedule.steps;
    const bool stop = max_over(world, stop_requested) > 0;
    if (recipe_.run.eval_every > 0 && (last || number % recipe_.run.eval_every == 0)) report.held_out_loss = evaluate();
    report.held_out_before = std::exchange(before, {});
    if (last || stop || number % recipe_.checkpoint.every == 0) save(number);
    report.checkpoint = checkpoint_note_;
    if (metrics_) metrics_->write(report);  // first: a step that was seen is in the file
    if (console_ && number == first) console_->line(implementations());
    if (console_) console_->step(report);
    if (skipped_in_a_row_ >= kMaxSkippedInARow)
      throw RunFailure(kExitNonFinite, "gradients were not finite in " + std::to_string(skipped_in_a_row_) +
                                           " steps in a row (the parameters are those of step " +
                                           std::to_string(number - skipped_in_a_row_) + ") lower the learning rate or look at the data");
    if (stop && !last) {
      finish("pre-empted at step " + std::to_string(number));
      throw RunFailure(kExitPreempted, "stopped on request after step " + std::to_string(number) +
                                           " (SIGUSR1 or SIGTERM) the state is saved: run the same command again");
    }
  }
  finish("all " + std::to_string(recipe_.schedule.steps) + " steps done");
}

void Trainer::announce(const std::vector<std::string>& devices) {
  const ModelConfig& c = start_.config;
  const Degrees& d = mesh_.layout().degrees();
  int64_t all = 0, indexers = 0;
  for (const HfTensor& t : hf_tensors(c, c.format())) {
    const int64_t n = t.duplicate_of.empty() ? numel(t.shape) : 0;
    all += n;
    indexers += is_indexer_tensor(t.name) ? n : 0;
  }
  const bool warmup = recipe_.stage == StageKind::WARMUP;
  const int64_t tokens = recipe_.batch.sequences * recipe_.data.sequence_length, steps = recipe_.schedule.steps;
  const int64_t next = (start_.resume ? start_.resume->state().step : 0) + 1;
  const auto line = [&](const std::string& text) { console_->line(text); };

  line(fmt::format("dsatrain {} | recipe {} {}", stage_name(recipe_.stage), resolved_.file, resolved_.digest));
  line(fmt::format("  model   {} layers + {} MTP, hidden {}, {} heads, {} experts top-{}{}", c.num_hidden_layers,
                   c.num_nextn_predict_layers, c.hidden_size, c.num_attention_heads, c.n_routed_experts, c.num_experts_per_tok,
                   c.indexer ? fmt::format(", indexer {} x {} top-{}", c.indexer->heads, c.indexer->head_dim, c.indexer->top_k)
                             : ""));
  line(fmt::format("  learns  {} of {} parameters ({}), {} attention, {}", warmup ? indexers : all, all,
                   warmup      ? "the indexers, by KL"
                   : c.indexer ? "the backbone by the next token, the indexers by KL"
                               : "by the next token",
                   recipe_.stage == StageKind::SPARSE ? "sparse" : "dense", name(recipe_.compute.precision)));
  line("  weights " + start_.story);
  line(fmt::format("  data    {} tokens, {} sequences of {}, held out {}; tokenizer {}", dataset_->tokens(), dataset_->samples(),
                   recipe_.data.sequence_length, dataset_->held_out_samples(), tokenizer_));
  line(next > steps ? fmt::format("  steps   none left of {}: raise schedule.steps to go on", steps)
                    : fmt::format("  steps   {}..{} of {} tokens", next, steps, tokens));
  line(fmt::format("  mesh    data {} x context {} x tensor {}, expert {}", d.data, d.context, d.tensor, d.expert));
  std::map<std::string, int> kinds;
  for (const std::string& device : devices) ++kinds[device];
  for (const auto& [device, ranks] : kinds) line(fmt::format("  device  {} x {}", ranks, device));
  line(fmt::format("  run     {} (tensorboard --logdir {})", recipe_.run.folder, recipe_.run.folder));
}

void Trainer::finish(const std::string& reason) {
  if (!console_) return;
  RunSummary summary = console_->meter().summary();
  summary.exit_reason = reason;
  summary.wall_seconds = now() - born_;
  summary.checkpoint_seconds = checkpoint_seconds_;
  summary.checkpoint = last_checkpoint_;
  summary.run_folder = recipe_.run.folder;
  summary.write_failures = console_->failures() + (metrics_ ? metrics_->failures() : 0);
  console_->line(format_summary(summary));
}

}  // namespace dsa
