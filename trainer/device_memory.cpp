#include "trainer/device_memory.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <vector>

#include "trainer/starting_point.h"

namespace dsa {
namespace {

std::string gib(int64_t bytes) { return fmt::format("{:.1f} GiB", static_cast<double>(bytes) / (1 << 30)); }

// "2.00 GiB more were needed" of LibTorch's long message.
std::string request(const std::string& message) {
  const std::string mark = "Tried to allocate ";
  const size_t begin = message.find(mark);
  if (begin == std::string::npos) return "an allocation failed";
  const size_t number = begin + mark.size();
  return message.substr(number, message.find(". ", number) - number) + " more were needed";
}

// What helps most first.
std::vector<std::string> remedies(const Recipe& r) {
  std::vector<std::string> all;
  if (r.stage != StageKind::WARMUP && r.compute.recompute == Recompute::NONE) all.push_back("compute.recompute: LAYER");
  if (r.batch.micro_sequences > 1) all.push_back(fmt::format("batch.micro_sequences: {}", r.batch.micro_sequences / 2));
  if (r.compute.query_block > 128) all.push_back(fmt::format("compute.query_block: {}", r.compute.query_block / 2));
  if (r.stage != StageKind::WARMUP && !r.optimizer.offload) all.push_back("optimizer.offload: true");
  if (r.stage != StageKind::WARMUP && r.compute.recompute == Recompute::LAYER && !r.compute.offload_hidden)
    all.push_back("compute.offload_hidden: true");
  all.push_back(fmt::format("parallel.context: {} on twice as many GPUs", 2 * r.parallel.context));
  all.push_back(fmt::format("data.sequence_length: {}", r.data.sequence_length / 2));
  return all;
}

}  // namespace

int64_t peak_memory_bytes(at::Device device) {
  if (!device.is_cpu()) {
    constexpr size_t kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    return at::getDeviceAllocator(device.type())->getDeviceStats(device.index()).allocated_bytes[kAll].peak;
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * 1024;
}

RunFailure out_of_memory(const std::string& message, const MemoryUse& use, const Recipe& recipe) {
  const std::vector<std::string> help = remedies(recipe);
  return RunFailure(
      kExitOutOfMemory,
      fmt::format("the device's memory does not suffice for {} of stage {} ({}; parameters {}, gradients and optimizer {}, "
                  "peak so far {}; {} sequences of {} tokens at a time, score tiles of {} query rows) set {}, or {}",
                  use.activity, stage_name(recipe.stage), request(message), gib(use.parameter_bytes), gib(use.optimizer_bytes),
                  gib(use.peak_bytes), recipe.batch.micro_sequences, recipe.data.sequence_length,
                  recipe.compute.query_block, help[0], help[1]));
}

}  // namespace dsa
