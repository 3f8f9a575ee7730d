#include "trainer/metrics/console.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstring>

namespace dsa {
namespace {

std::string thousands(double value) {
  if (!std::isfinite(value)) return fmt::format("{}", value);
  std::string digits = fmt::format("{:.0f}", value);
  for (int at = static_cast<int>(digits.size()) - 3; at > (digits[0] == '-' ? 1 : 0); at -= 3) digits.insert(at, ",");
  return digits;
}

// 252M, 2.5B: three significant digits.
std::string short_count(double value) {
  const char* unit = "";
  for (const char* next : {"K", "M", "B", "T"}) {
    if (value < 999.5) break;
    value /= 1000;
    unit = next;
  }
  if (*unit == '\0') return fmt::format("{:.0f}", value);
  return fmt::format("{:.{}f}{}", value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0, unit);
}

std::string duration(double seconds) {
  const auto s = static_cast<int64_t>(std::llround(seconds));
  if (s < 60) return fmt::format("{}s", s);
  if (s < 3600) return fmt::format("{}m{:02}s", s / 60, s % 60);
  if (s < 86400) return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
  return fmt::format("{}d{:02}h", s / 86400, s / 3600 % 24);
}

// The layer of the largest value; a NaN is larger than anything.
size_t worst(const std::vector<double>& values) {
  size_t at = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) return i;
    if (values[i] > values[at]) at = i;
  }
  return at;
}

double percent(double part, double whole) { return whole > 0 ? 100 * part / whole : 0; }

}  // namespace

std::string format_step(const StepReport& r, double seconds_per_step) {
  std::string out = fmt::format("step {}/{} {}", r.step, r.steps, r.stage);
  const auto part = [&](const std::string& text) { out += " | " + text; };
  if (r.lm_loss) part(fmt::format("lm {:.4f}", *r.lm_loss));
  if (r.mtp_loss) part(fmt::format("mtp {:.4f}", *r.mtp_loss));
  if (r.kl_mean) {
    std::string kl = fmt::format("kl {:.4f}", *r.kl_mean);
    if (!r.kl_layer.empty()) {
      const size_t layer = worst(r.kl_layer);
      kl += fmt::format(" max L{} {:.4f}", layer, r.kl_layer[layer]);
    }
    part(kl);
  }
  if (!r.recall_layer.empty()) part(fmt::format("recall@{} {:.3f}", r.top_k, mean(r.recall_layer)));
  if (r.held_out_loss) part(fmt::format("held-out {:.4f}", *r.held_out_loss));
  if (r.grad_norm_backbone || r.grad_norm_indexer) {
    std::string norms = "gnorm";
    if (r.grad_norm_backbone) norms += fmt::format(" {:.3g}", *r.grad_norm_backbone);
    if (r.grad_norm_indexer) norms += fmt::format(" idx {:.3g}", *r.grad_norm_indexer);
    part(norms);
  }
  if (r.lr || r.indexer_lr) {
    std::string rates = "lr";
    if (r.lr) rates += fmt::format(" {:.2e}", *r.lr);
    if (r.indexer_lr && r.indexer_lr != r.lr) rates += fmt::format(" idx {:.2e}", *r.indexer_lr);
    part(rates);
  }
  if (r.expert_load_max_over_mean) part(fmt::format("load {:.2f}", *r.expert_load_max_over_mean));
  part(fmt::format("skip {}", r.skipped_total));
  part(short_count(static_cast<double>(r.tokens_total)) + " tok");
  part(thousands(r.tokens_per_second) + " tok/s");
  part(fmt::format("{:.3g} s/step", r.step_seconds));
  part(fmt::format("mem {:.1f} GiB", static_cast<double>(r.memory_bytes) / (1 << 30)));
  part(fmt::format("data {:.1f}%", percent(r.data_seconds, r.step_seconds)));
  if (!r.checkpoint.empty()) part("ckpt " + r.checkpoint);
  if (seconds_per_step > 0) part("eta " + duration(seconds_per_step * static_cast<double>(r.steps - r.step)));
  return out;
}

std::string format_summary(const RunSummary& s) {
  std::string out = fmt::format("{}\n", s.exit_reason);
  out += fmt::format("  tokens      {} in {} ({} tok/s)\n", thousands(static_cast<double>(s.tokens)),
                     duration(s.wall_seconds), thousands(s.wall_seconds > 0 ? static_cast<double>(s.tokens) / s.wall_seconds : 0));
  out += fmt::format("  goodput     {:.1f}% in steps, of which {:.1f}% waiting for data; {:.1f}% writing checkpoints\n",
                     percent(s.step_seconds, s.wall_seconds), percent(s.data_seconds, s.step_seconds),
                     percent(s.checkpoint_seconds, s.wall_seconds));
  if (s.last_loss) {
    out += fmt::format("  {:<11} {:.4f} at the end", s.loss_name, *s.last_loss);
    if (s.best_loss) out += fmt::format(", best {:.4f} at step {}", *s.best_loss, s.best_step);
    if (s.held_out_loss) out += fmt::format(", held-out lm loss {:.4f}", *s.held_out_loss);
    out += "\n";
  }
  if (s.skipped > 0) out += fmt::format("  skipped     {} steps that were not finite\n", s.skipped);
  if (!s.checkpoint.empty()) out += fmt::format("  checkpoint  {}\n", s.checkpoint);
  out += fmt::format("  dashboards  tensorboard --logdir {}\n", s.run_folder);
  if (s.write_failures > 0) out += fmt::format("  missing     {} writes of console or metrics failed\n", s.write_failures);
  return out;
}

void RunMeter::add(const StepReport& r) {
  const double weight = seconds_per_step_ == 0 ? 1.0 : 0.05;
  seconds_per_step_ += weight * (r.step_seconds - seconds_per_step_);
  // The first report cannot tell how many of its tokens are its own, but its speed and time do.
  const int64_t before =
      tokens_before_.value_or(r.tokens_total - std::llround(r.tokens_per_second * r.step_seconds));
  summary_.tokens += r.tokens_total - before;
  tokens_before_ = r.tokens_total;
  summary_.step_seconds += r.step_seconds;
  summary_.data_seconds += r.data_seconds;
  summary_.skipped = r.skipped_total;
  const bool warmup = !r.lm_loss || r.stage == "warmup";
  const std::optional<double>& loss = warmup ? r.kl_mean : r.lm_loss;
  summary_.loss_name = warmup ? "kl" : "lm loss";
  if (r.held_out_loss) summary_.held_out_loss = r.held_out_loss;
  if (!loss) return;
  summary_.last_loss = loss;
  if (!std::isnan(*loss) && (!summary_.best_loss || *loss < *summary_.best_loss)) {
    summary_.best_loss = loss;
    summary_.best_step = r.step;
  }
}

Console::Console(std::FILE* out, int64_t log_every) : out_(out), log_every_(log_every) { std::signal(SIGPIPE, SIG_IGN); }

void Console::step(const StepReport& report) {
  meter_.add(report);
  const bool wanted = first_ || report.step == report.steps || report.step % log_every_ == 0 || report.held_out_loss;
  first_ = false;
  if (wanted) line(format_step(report, meter_.seconds_per_step()));
}

void Console::line(const std::string& text) {
  errno = 0;
  const bool written = std::fprintf(out_, "%s\n", text.c_str()) >= 0 && std::fflush(out_) == 0;
  if (written) return;
  const int why = errno;
  std::clearerr(out_);
  if (failures_++ == 0) {
    std::fprintf(stderr, "console: cannot write (%s); training goes on, later failures are only counted\n", std::strerror(why));
  }
}

}  // namespace dsa
