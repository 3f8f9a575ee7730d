// What a person sees of a run: one line a step, `key value` in a stable order, and a summary at the end.
//   step 40/15000 sparse | lm 1.6821 | mtp 2.0134 | kl 0.0412 max L43 0.2140 | recall@2048 0.957 | gnorm 0.61 idx 0.42 |
//   lr 7.30e-06 | load 1.32 | skip 0 | 2.5B tok | 1,842 tok/s | 1.43 s/step | mem 1.3 GiB | data 0.4% | ckpt 20 ok |
//   eta 3h12m                                                      (one line; parts that the stage lacks are left out)
// One rank prints, without colours. A closed or full stdout never stops a run: failures are counted, said once on stderr.
#pragma once

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

#include "trainer/metrics/step_report.h"

namespace dsa {

// `eta` comes from seconds_per_step, a smoothed value; 0 leaves it out.
std::string format_step(const StepReport& report, double seconds_per_step);

struct RunSummary {
  std::string exit_reason;  // "all 40 steps done", "pre-empted at step 12", ...
  int64_t tokens = 0;       // of this process's steps
  double wall_seconds = 0;  // since start-up
  double step_seconds = 0;  // spent in steps; goodput = step_seconds / wall_seconds
  double data_seconds = 0;  // of these, waiting for data
  double checkpoint_seconds = 0;
  std::string loss_name = "lm loss";  // "kl" in the warm-up
  std::optional<double> last_loss, best_loss, held_out_loss;
  int64_t best_step = 0;
  std::string checkpoint;   // path of the newest; may be empty
  std::string run_folder;   // also holds metrics.jsonl and TensorBoard's files
  int64_t skipped = 0;
  int64_t write_failures = 0;  // of console and metrics
};
std::string format_summary(const RunSummary& summary);

// Collects what the summary needs, and the time per step.
class RunMeter {
 public:
  void add(const StepReport& report);
  double seconds_per_step() const { return seconds_per_step_; }  // exponential mean over about 20 steps
  // Everything but exit_reason, wall and checkpoint seconds, folders and write_failures.
  const RunSummary& summary() const { return summary_; }

 private:
  RunSummary summary_;
  double seconds_per_step_ = 0;
  std::optional<int64_t> tokens_before_;
};

class Console {
 public:
  // Ignores SIGPIPE from here on: a closed pipe shall be a failed write, not the end of the run.
  explicit Console(std::FILE* out = stdout, int64_t log_every = 1);

  // Prints the first, the last and every log_every-th step, and each that was followed by an evaluation.
  void step(const StepReport& report);
  void line(const std::string& text);
  const RunMeter& meter() const { return meter_; }
  int64_t failures() const { return failures_; }

 private:
  std::FILE* out_;
  int64_t log_every_;
  bool first_ = true;
  RunMeter meter_;
  int64_t failures_ = 0;
};

}  // namespace dsa
