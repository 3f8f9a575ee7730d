#include "trainer/metrics/metrics_writer.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "trainer/metrics/append_file.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

Json number(double value) {
  if (std::isfinite(value)) return value;
  return std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

void put(Json& object, const char* key, const std::optional<double>& value) {
  if (value) object[key] = number(*value);
}

void put(Json& object, const char* key, const std::vector<double>& values) {
  if (values.empty()) return;
  Json list = Json::array();
  for (const double value : values) list.push_back(number(value));
  object[key] = std::move(list);
}

std::string line_of(const StepReport& r, double time) {
  Json object;
  object["step"] = r.step;
  object["stage"] = r.stage;
  object["time"] = time;
  put(object, "lm_loss", r.lm_loss);
  put(object, "mtp_loss", r.mtp_loss);
  put(object, "kl_mean", r.kl_mean);
  put(object, "kl_layer", r.kl_layer);
  put(object, "recall_layer", r.recall_layer);
  put(object, "entropy_layer", r.entropy_layer);
  if (r.top_k > 0) object["top_k"] = r.top_k;
  put(object, "held_out_loss", r.held_out_loss);
  put(object, "held_out_before", r.held_out_before);
  put(object, "grad_norm_backbone", r.grad_norm_backbone);
  put(object, "grad_norm_indexer", r.grad_norm_indexer);
  put(object, "lr", r.lr);
  put(object, "indexer_lr", r.indexer_lr);
  put(object, "expert_load_max_over_mean", r.expert_load_max_over_mean);
  object["skipped_total"] = r.skipped_total;
  object["tokens_total"] = r.tokens_total;
  object["tokens_per_second"] = number(r.tokens_per_second);
  object["step_seconds"] = number(r.step_seconds);
  object["data_seconds"] = number(r.data_seconds);
  object["memory_bytes"] = r.memory_bytes;
  if (!r.checkpoint.empty()) object["checkpoint"] = r.checkpoint;
  return object.dump() + "\n";
}

// Keeps the whole lines of earlier steps, through a temporary file and a rename.
void forget_steps(const std::string& path, int64_t first_step) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return;
  const std::string kept_path = path + ".tmp";
  std::ofstream out(kept_path, std::ios::binary | std::ios::trunc);
  bool changed = false;
  for (std::string line; std::getline(in, line);) {
    const bool whole = !in.eof();  // the last line must end in a newline too
    const Json object = whole ? Json::parse(line, nullptr, false) : Json();
    const auto step = object.is_object() ? object.find("step") : object.end();
    if (object.is_object() && step != object.end() && step->is_number_integer() && step->get<int64_t>() < first_step) {
      out << line << '\n';
    } else {
      changed = true;
    }
  }
  out.close();
  std::error_code ignored;
  if (!out) {
    const std::error_code why(errno, std::generic_category());
    fs::remove(kept_path, ignored);
    throw std::system_error(why, "cannot rewrite " + path);
  }
  if (changed) {
    fs::rename(kept_path, path);
  } else {
    fs::remove(kept_path, ignored);
  }
}

}  // namespace

std::vector<Scalar> tags_of(const StepReport& r) {
  std::vector<Scalar> out;
  const auto scalar = [&](const char* tag, const std::optional<double>& value) {
    if (value) out.push_back({tag, *value});
  };
  const auto layers = [&](const char* tag, const std::vector<double>& values) {
    for (size_t layer = 0; layer < values.size(); ++layer) {
      out.push_back({fmt::format("{}/{:02}", tag, layer), values[layer]});
    }
  };
  scalar("train/lm_loss", r.lm_loss);
  scalar("train/mtp_loss", r.mtp_loss);
  scalar("train/kl_mean", r.kl_mean);
  layers("train/kl_layer", r.kl_layer);
  if (!r.recall_layer.empty()) out.push_back({"dsa/recall_at_k", mean(r.recall_layer)});
  layers("dsa/recall_layer", r.recall_layer);
  if (!r.entropy_layer.empty()) out.push_back({"dsa/entropy", mean(r.entropy_layer)});
  layers("dsa/entropy_layer", r.entropy_layer);
  scalar("eval/held_out_loss", r.held_out_loss);
  scalar("grad_norm/backbone", r.grad_norm_backbone);
  scalar("grad_norm/indexer", r.grad_norm_indexer);
  scalar("lr/backbone", r.lr);
  scalar("lr/indexer", r.indexer_lr);
  scalar("moe/load_max_over_mean", r.expert_load_max_over_mean);
  out.push_back({"perf/tok_s", r.tokens_per_second});
  out.push_back({"perf/step_ms", 1e3 * r.step_seconds});
  if (r.step_seconds > 0) out.push_back({"perf/data_pct", 100 * r.data_seconds / r.step_seconds});
  out.push_back({"mem/peak_gib", static_cast<double>(r.memory_bytes) / (1 << 30)});
  out.push_back({"stability/skip", static_cast<double>(r.skipped_total)});
  return out;
}

template <class Action>
void MetricsWriter::guarded(Action&& action) {
  try {
    action();
  } catch (const std::exception& error) {
    if (failures_++ == 0) {
      std::fprintf(stderr, "metrics: %s; training goes on, later failures are only counted\n", error.what());
    }
  }
}

MetricsWriter::MetricsWriter(std::string folder, int64_t first_step) {
  const std::string path = folder + "/metrics.jsonl";
  guarded([&] { forget_steps(path, first_step); });
  guarded([&] { lines_ = std::make_unique<AppendFile>(path); });
  guarded([&] { events_ = std::make_unique<EventWriter>(folder, first_step); });
}

MetricsWriter::~MetricsWriter() = default;

void MetricsWriter::write(const StepReport& report) {
  const double time = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  if (lines_) guarded([&] { lines_->append(line_of(report, time)); });
  if (events_) guarded([&] { events_->write(report.step, time, tags_of(report)); });
}

}  // namespace dsa
