#include "trainer/checkpoint/inspect.h"

#include <filesystem>
#include <functional>
#include <map>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "data/error.h"
#include "data/file.h"
#include "data/hf_folder.h"
#include "data/hf_names.h"
#include "data/token_source.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/manifest.h"
#include "trainer/checkpoint/run_folder.h"
#include "trainer/checkpoint/save_plan.h"
#include "trainer/checkpoint/weight_source.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;

// 1234567 -> "1,234,567"
std::string grouped(uint64_t n) {
  std::string text = std::to_string(n);
  for (int at = static_cast<int>(text.size()) - 3; at > 0; at -= 3) text.insert(at, 1, ',');
  return text;
}

class Report {
 public:
  void line(const std::string& key, const std::string& value) { out_.text += fmt::format("{:<12} {}\n", key, value); }
  void problem(const std::string& what) {
    out_.healthy = false;
    line("PROBLEM", what);
  }
  /// Turns an InputError of `work` into a problem.
  void check(const std::string& health, const std::function<void()>& work) {
    try {
      work();
      line("health", health);
    } catch (const InputError& e) {
      problem(e.what());
    }
  }
  Inspection take() { return std::move(out_); }

 private:
  Inspection out_;
};

std::string model_line(const ModelConfig& c) {
  std::string text = fmt::format("{} layers{}, hidden {}, {} heads, {} experts top-{}, vocabulary {}",
                                 c.num_hidden_layers,
                                 c.num_nextn_predict_layers ? fmt::format(" + {} MTP", c.num_nextn_predict_layers) : "",
                                 c.hidden_size, c.num_attention_heads, c.n_routed_experts, c.num_experts_per_tok,
                                 c.vocab_size);
  if (c.indexer)
    text += fmt::format(", indexer {} x {} top-{}", c.indexer->heads, c.indexer->head_dim, c.indexer->top_k);
  return text;
}

struct Count {
  uint64_t tensors = 0, elements = 0, bytes = 0;
  void add(uint64_t n, uint64_t size) {
    ++tensors;
    elements += n;
    bytes += size;
  }
  std::string text() const {
    return fmt::format("{} tensors, {} elements, {} bytes", grouped(tensors), grouped(elements), grouped(bytes));
  }
};

void inspect_hf(const std::string& path, Report& report) {
  const HfFolder folder(path);
  const ModelConfig& config = folder.config();
  report.line("kind", fmt::format("HF model folder, {} format", config.indexer ? "V3.2" : "V3.1"));
  report.line("model", model_line(config));
  std::map<Dtype, Count> by_dtype;
  Count all;
  uint64_t parameters = 0;
  for (const HfTensor& tensor : hf_tensors(config, config.format()))
    if (tensor.duplicate_of.empty()) parameters += numel(tensor.shape);
  for (const std::string& name : folder.names()) {
    const uint64_t n = numel(folder.shape(name)), bytes = folder.raw_bytes(name);
    by_dtype[folder.stored_dtype(name)].add(n, bytes);
    all.add(n, bytes);
  }
  report.line("parameters", grouped(parameters));
  report.line("stored", fmt::format("{} in {} shards", all.text(), folder.shard_count()));
  for (const auto& [dtype, count] : by_dtype) report.line("  " + name(dtype), count.text());
  report.line("digest", folder.digest());
  report.check("headers, index and shapes agree with config.json (tensor data has no checksum in this format)",
               [&] { folder.check_against(config); });
}

void inspect_checkpoint(const std::string& path, Report& report) {
  const CheckpointReader reader(path);
  const TrainingState& state = reader.state();
  report.line("kind", "dsatrain checkpoint");
  report.line("step", fmt::format("{} of stage {}, {} sequences, {} tokens", state.step, state.stage,
                                  grouped(state.sequences_seen), grouped(state.tokens_seen)));
  report.check("the model's config.json is legal", [&] {
    report.line("model", model_line(ModelConfig::from_json(state.model_json, "its model")));
  });
  report.line("saved by", state.mesh);
  report.line("conventions", state.conventions);
  report.line("recipe", "digest " + state.recipe_digest);
  report.line("data", fmt::format("digest {}, seed {}, sequence length {}", state.data_digest, state.data_seed,
                                  state.sequence_length));
  for (Role role : {Role::PARAM, Role::MOMENT1, Role::MOMENT2, Role::BUFFER}) {
    std::map<Dtype, Count> by_dtype;
    for (const std::string& name : reader.names(role)) {
      const Dtype dtype = reader.stored_dtype(name, role);
      const std::vector<int64_t> shape = reader.shape(name, role);
      by_dtype[dtype].add(numel(shape), bytes_of(dtype, shape));
    }
    for (const auto& [dtype, count] : by_dtype)
      report.line(role_name(role), fmt::format("{}: {}", name(dtype), count.text()));
  }
  report.line("files", grouped(reader.bytes()) + " bytes");
  report.line("digest", reader.digest());
  report.check("every byte has the hash that was written", [&] { reader.verify(); });
  if (state.base_path.empty()) return report.line("base", "none: self-contained");
  report.line("base", state.base_path + " (holds the frozen tensors)");
  report.check("the base is the one that it started from", [&] { open_weights(path); });
}

void inspect_run(const std::string& path, Report& report) {
  report.line("kind", "dsatrain run folder");
  const std::vector<int64_t> steps = checkpoint_steps(path);
  report.line("checkpoints", steps.empty() ? "none" : fmt::format("steps {}", fmt::join(steps, ", ")));
  std::string newest;
  for (int64_t step : steps) {
    const std::string folder = checkpoint_folder(path, step);
    report.check(fmt::format("step {} is sound", step), [&] {
      CheckpointReader(folder).verify();
      newest = folder;
    });
  }
  std::error_code none_yet;
  for (const auto& entry : fs::directory_iterator(fs::path(path) / kCheckpointsFolder, none_yet)) {
    const std::string name = entry.path().filename().string();
    if (is_leftover(name))
      report.line("leftover", name + " (removed by the next save)");
  }
  const std::string lock = (fs::path(path) / "LOCK").string();
  if (path_exists(lock)) report.line("in use by", read_text_file(lock, 4096).substr(0, 200));
  if (newest.empty()) return;
  report.line("resumes at", newest);
  inspect_checkpoint(newest, report);
}

void inspect_tokens(const std::string& path, Report& report) {
  const auto tokens = open_token_source(path, 0, true);
  report.line("kind", tokens->vocab_size() ? "token file" : "Megatron index and binary");
  report.line("tokens", grouped(tokens->size()));
  report.line("documents", grouped(tokens->documents()));
  if (tokens->vocab_size())
    report.line("vocabulary", fmt::format("{}, BOS {}, EOS {}, tokenizer {}", tokens->vocab_size(), tokens->bos_id(),
                                          tokens->eos_id(), tokens->tokenizer_sha256()));
  if (!tokens->source().empty()) report.line("source", tokens->source());
  report.line("digest", tokens->digest());
  report.line("health", "every id is below the vocabulary, documents are in order");
}

}  // namespace

Inspection inspect(const std::string& path) {
  Report report;
  report.line("path", path);
  const fs::path folder(path);
  const bool tokens = !fs::is_directory(folder) && (fs::exists(folder) || fs::exists(path + ".idx"));
  if (fs::exists(folder / kManifestFile))
    inspect_checkpoint(path, report);
  else if (fs::is_directory(folder / kCheckpointsFolder) || fs::exists(folder / "metrics.jsonl"))
    inspect_run(path, report);
  else if (fs::exists(folder / "config.json"))
    inspect_hf(path, report);
  else if (tokens)
    inspect_tokens(path, report);
  else
    throw InputError("cannot inspect " + path, fs::exists(folder) ? "it holds nothing known" : "it is not there",
                     "give an HF folder, a checkpoint, a run folder or a token file");
  return report.take();
}

}  // namespace dsa
