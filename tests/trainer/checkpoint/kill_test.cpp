// SIGKILL at random instants of a run that saves without a pause: every restart finds a committed step, the last one
// that the run reported or the one that it was just committing, and every byte of it is right.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <thread>

#include "parallel/local_communicator.h"
#include "synthetic_state.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/run_folder.h"
#include "trainer/checkpoint/save.h"

namespace dsa {
namespace {

constexpr int kKills = 40;

std::vector<test::TensorKind> state_kinds() {
  std::vector<test::TensorKind> kinds = test::synthetic_tensors();
  for (int i = 0; i < 20; ++i) kinds.push_back({"extra." + std::to_string(i), {64, 256}, Role::PARAM, Dtype::F32});
  return kinds;
}

void save_step(const std::string& run, int64_t step) {
  LocalCommunicator world;
  const test::HeldState held = test::whole_state(state_kinds(), step);
  if (!save_checkpoint(run, test::synthetic_facts(step), held.shards, world, 2).committed) ::_exit(9);
}

TEST(Kill, EveryRestartLoadsACommittedStep) {
  test::TempFolder run("kill");
  save_step(run.path(), 1);
  int64_t newest = 1;
  std::mt19937 rng(std::random_device{}());
  int cut_short = 0;  // kills that left an unfinished save behind
  for (int kill = 0; kill < kKills; ++kill) {
    int pipe_ends[2];
    ASSERT_EQ(::pipe(pipe_ends), 0);
    const int64_t begin = kill % 8 == 7 ? newest : newest + 1;  // now and then a step is written again
    const pid_t child = ::fork();
    if (child == 0) {
      for (int64_t step = begin;; ++step) {
        save_step(run.path(), step);
        if (::write(pipe_ends[1], &step, sizeof step) != sizeof step) ::_exit(8);
      }
    }
    ::close(pipe_ends[1]);
    std::this_thread::sleep_for(std::chrono::microseconds(2000 + rng() % 90000));
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << status;
    int64_t reported = newest, step = 0;
    while (::read(pipe_ends[0], &step, sizeof step) == sizeof step) reported = step;
    ::close(pipe_ends[0]);

    for (const auto& entry : std::filesystem::directory_iterator(run / "checkpoints"))
      if (entry.path().string().find(".tmp-") != std::string::npos) {
        ++cut_short;
        break;
      }
    std::vector<std::string> why;
    const auto folder = CheckpointReader::newest_valid(run.path(), &why);
    ASSERT_TRUE(folder);
    EXPECT_TRUE(why.empty()) << why[0];  // what has a step's name is whole
    const CheckpointReader reader(*folder);
    newest = reader.state().step;
    EXPECT_GE(newest, reported);
    EXPECT_LE(newest, reported + 1);
    EXPECT_TRUE(reader.state() == test::synthetic_facts(newest));
    for (const test::TensorKind& kind : state_kinds()) {
      const ShardSpec all = whole(kind.name, kind.shape);
      const std::vector<char> expected = test::make_box(kind, all.box(), newest);
      std::vector<char> got(expected.size());
      reader.read(all, kind.role, kind.dtype, got.data());
      EXPECT_EQ(got, expected) << kind.name;
    }
  }
  EXPECT_GT(cut_short, 0) << "no kill fell into a save: the test proved nothing";
  save_step(run.path(), newest + 1);  // removes what the dead runs left
  for (const auto& entry : std::filesystem::directory_iterator(run / "checkpoints"))
    EXPECT_EQ(entry.path().string().find(".tmp-"), std::string::npos) << entry.path();
}

}  // namespace
}  // namespace dsa
