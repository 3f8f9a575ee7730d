// The files of a run's numbers, in its folder:
//   metrics.jsonl               one object a step, keys as StepReport's members (absent ones left out), plus "time" in
//                               seconds since 1970. JSON has no NaN: "nan", "inf" and "-inf" are strings.
//   events.out.tfevents.*       the same for TensorBoard (tags: tags_of)
// One rank writes. Neither a full disk nor a lost folder stops a run: failures are counted, and said once on stderr.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "trainer/metrics/event_writer.h"
#include "trainer/metrics/step_report.h"

namespace dsa {

// train/{lm_loss,mtp_loss,kl_mean,kl_layer/00..}, dsa/{recall_at_k,recall_layer/00..,entropy,entropy_layer/00..},
// eval/held_out_loss, grad_norm/{backbone,indexer}, lr/{backbone,indexer}, moe/load_max_over_mean,
// perf/{tok_s,step_ms,data_pct}, mem/peak_gib, stability/skip.
std::vector<Scalar> tags_of(const StepReport& report);

class MetricsWriter {
 public:
  // first_step: the first this run reports. Lines of that step and later, left by a run that was cut off after its
  // last checkpoint, are removed from metrics.jsonl; so is a half-written last line.
  MetricsWriter(std::string folder, int64_t first_step);
  ~MetricsWriter();

  void write(const StepReport& report);
  int64_t failures() const { return failures_; }

 private:
  template <class Action>
  void guarded(Action&& action);

  std::unique_ptr<AppendFile> lines_;
  std::unique_ptr<EventWriter> events_;
  int64_t failures_ = 0;
};

}  // namespace dsa
