// The choice of a checkpoint at a restart: the newest one whose every byte is as written.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "data/error.h"
#include "parallel/communicator.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/run_folder.h"

namespace dsa {
namespace {

// Empty when sound, as far as this part goes; else the reason.
std::string problem(const std::string& folder, int part, int parts) {
  try {
    CheckpointReader(folder).verify(part, parts);
  } catch (const InputError& e) {
    return e.what();
  }
  return "";
}

}  // namespace

std::optional<std::string> CheckpointReader::newest_valid(const std::string& run_folder,
                                                          std::vector<std::string>* why_skipped) {
  const std::vector<int64_t> steps = checkpoint_steps(run_folder);
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    const std::string folder = checkpoint_folder(run_folder, *step);
    const std::string why = problem(folder, 0, 1);
    if (why.empty()) return folder;
    if (why_skipped) why_skipped->push_back(fmt::format("step {}: {}", *step, why));
  }
  return std::nullopt;
}

std::optional<std::string> CheckpointReader::newest_valid(const std::string& run_folder, Communicator& world,
                                                          std::vector<std::string>* why_skipped) {
  // Rank 0's list: on a network file system another rank may see an older state of the folder.
  std::string mine;
  if (world.rank() == 0)
    for (int64_t step : checkpoint_steps(run_folder)) mine = std::to_string(step) + "\n" + mine;
  const std::string newest_first = world.all_gather_text(mine)[0];
  for (size_t begin = 0; begin < newest_first.size();) {
    const size_t end = newest_first.find('\n', begin);
    const int64_t step = std::stoll(newest_first.substr(begin, end - begin));
    begin = end + 1;
    const std::string folder = checkpoint_folder(run_folder, step);
    std::string first_problem;
    for (const std::string& why : world.all_gather_text(problem(folder, world.rank(), world.size())))
      if (first_problem.empty()) first_problem = why;
    if (first_problem.empty()) return folder;
    if (why_skipped) why_skipped->push_back(fmt::format("step {}: {}", step, first_problem));
  }
  return std::nullopt;
}

}  // namespace dsa
