#include "trainer/checkpoint/run_folder.h"

#include <algorithm>
#include <filesystem>
#include <system_error>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace dsa {
namespace {

namespace fs = std::filesystem;

constexpr const char* kStep = "step-";

}  // namespace

std::string checkpoint_folder(const std::string& run_folder, int64_t step) {
  return (fs::path(run_folder) / kCheckpointsFolder / fmt::format("{}{:08}", kStep, step)).string();
}

std::vector<int64_t> checkpoint_steps(const std::string& run_folder) {
  std::vector<int64_t> steps;
  std::error_code gone;
  for (const auto& entry : fs::directory_iterator(fs::path(run_folder) / kCheckpointsFolder, gone)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind(kStep, 0) != 0) continue;
    const std::string digits = name.substr(5);
    if (digits.size() < 8 || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos) continue;
    const int64_t step = std::stoll(digits);
    if (fs::path(checkpoint_folder(run_folder, step)).filename() == name) steps.push_back(step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

bool is_leftover(const std::string& name) {
  return (name.rfind(kStep, 0) == 0 || name.rfind("LATEST", 0) == 0) &&
         (name.find(".tmp-") != std::string::npos || name.ends_with(".trash"));
}

void remove_leftovers(const std::string& checkpoints_folder) {
  std::vector<fs::path> leftovers;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(checkpoints_folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (is_leftover(name)) leftovers.push_back(entry.path());
  }
  for (const fs::path& path : leftovers) fs::remove_all(path, ignored);
}

}  // namespace dsa
