#include "trainer/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace dsa {

double lr_factor(const Recipe::Schedule& schedule, double peak_lr, int64_t step) {
  if (step < schedule.warmup_steps) return static_cast<double>(step) / static_cast<double>(schedule.warmup_steps);
  const double last = schedule.final_lr / peak_lr;
  const double span = static_cast<double>(std::max<int64_t>(schedule.steps - schedule.warmup_steps, 1));
  const double progress = std::clamp(static_cast<double>(step - schedule.warmup_steps) / span, 0.0, 1.0);
  switch (schedule.decay) {
    case Decay::CONSTANT: return 1;
    case Decay::LINEAR: return 1 + (last - 1) * progress;
    case Decay::COSINE: return last + (1 - last) * 0.5 * (1 + std::cos(std::numbers::pi * progress));
  }
  return 1;
}

}  // namespace dsa
