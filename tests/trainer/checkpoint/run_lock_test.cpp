// One run per folder.
#include "trainer/checkpoint/run_lock.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <optional>

#include "data/error.h"
#include "data/file.h"
#include "synthetic_state.h"

namespace dsa {
namespace {

std::string refusal(const std::string& run) {
  try {
    RunLock lock(run);
  } catch (const InputError& e) {
    return e.what();
  }
  return "taken";
}

// A child that holds the lock until it is killed.
pid_t holder(const std::string& run) {
  int ready[2];
  EXPECT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    RunLock lock(run);
    if (::write(ready[1], "x", 1) != 1) ::_exit(1);
    for (;;) ::pause();
  }
  char x;
  EXPECT_EQ(::read(ready[0], &x, 1), 1);
  ::close(ready[0]);
  ::close(ready[1]);
  return child;
}

TEST(RunLock, SecondRunIsRefusedAndTheFirstNamed) {
  test::TempFolder run("lock");
  const pid_t child = holder(run / "new");  // makes the folder
  const std::string words = refusal(run / "new");
  EXPECT_NE(words.find("process " + std::to_string(child)), std::string::npos) << words;
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  EXPECT_EQ(refusal(run / "new"), "taken");  // a dead owner's lock is taken over
  EXPECT_FALSE(path_exists(run / "new/LOCK"));
}

TEST(RunLock, IsGivenBackAndNotTakenTwice) {
  test::TempFolder run("lock2");
  {
    RunLock lock(run.path());
    EXPECT_NE(refusal(run.path()).find("is in use"), std::string::npos);
  }
  EXPECT_EQ(refusal(run.path()), "taken");
}

TEST(RunLock, AReusedProcessIdDoesNotCount) {
  test::TempFolder run("lock3");
  char host[256] = "";
  ::gethostname(host, sizeof host - 1);
  std::ofstream(run / "LOCK") << host << " " << ::getpid() << " another-boot/1\n";
  EXPECT_EQ(refusal(run.path()), "taken");
}

TEST(RunLock, AnotherHostIsBelieved) {
  test::TempFolder run("lock4");
  std::ofstream(run / "LOCK") << "far-away 12 boot/1\n";
  EXPECT_NE(refusal(run.path()).find("process 12 on host far-away"), std::string::npos) << refusal(run.path());
  EXPECT_TRUE(path_exists(run / "LOCK"));
}

TEST(RunLock, UnwritableFolder) {
  test::TempFolder run("lock5");
  std::ofstream(run / "file") << "x";
  EXPECT_NE(refusal(run / "file/run").find("cannot create the run folder"), std::string::npos);
}

}  // namespace
}  // namespace dsa
