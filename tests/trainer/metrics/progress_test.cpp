#include "trainer/metrics/progress.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/trainer/metrics/scratch_folder.h"

namespace dsa {
namespace {

// What 1000 items of `seconds` each leave in the log.
std::string run(bool terminal, double seconds, const std::string& unit = "tensors", int64_t total = 1000, int64_t amount = 1) {
  const ScratchFolder folder;
  std::FILE* file = std::fopen((folder.path() + "/log").c_str(), "w");
  double now = 100;
  {
    Progress progress("export", total, unit, {file, terminal, [&] { return now; }});
    for (int i = 0; i < 1000; ++i) {
      now += seconds;
      progress.add(amount);
    }
  }
  std::fclose(file);
  return read_whole(folder.path() + "/log");
}

TEST(Progress, LogsALineEveryTenSecondsAndOneAtTheEnd) {
  EXPECT_EQ(run(false, 0.03125),  // exact in binary: 31.25 s in all
            "export: 320 / 1,000 tensors (32.0%), 32 tensors/s, eta 21s\n"
            "export: 640 / 1,000 tensors (64.0%), 32 tensors/s, eta 11s\n"
            "export: 960 / 1,000 tensors (96.0%), 32 tensors/s, eta 1s\n"
            "export: 1,000 / 1,000 tensors (100.0%), 32 tensors/s, 31s\n");
}

TEST(Progress, ShortWorkIsSilentInALog) { EXPECT_EQ(run(false, 1e-3), ""); }

TEST(Progress, WorkOverTwoSecondsLeavesOneLine) {
  EXPECT_EQ(run(false, 0.00390625), "export: 1,000 / 1,000 tensors (100.0%), 256 tensors/s, 4s\n");
}

TEST(Progress, BytesAreShownInGib) {
  EXPECT_EQ(run(false, 0.00390625, "bytes", 1000ll << 20, 1 << 20), "export: 0.98 / 0.98 GiB (100.0%), 0.25 GiB/s, 4s\n");
}

TEST(Progress, ATerminalLineOverwritesItselfAndEnds) {
  const std::string out = run(true, 0.0078125);
  EXPECT_EQ(out.front(), '\r');
  EXPECT_EQ(out.back(), '\n');
  EXPECT_EQ(std::count(out.begin(), out.end(), '\n'), 1);
  EXPECT_GT(std::count(out.begin(), out.end(), '\r'), 50);
  EXPECT_NE(out.find("1,000 / 1,000 tensors (100.0%)"), std::string::npos);
}

TEST(Progress, UnknownTotal) {
  EXPECT_EQ(run(false, 0.00390625, "tokens", 0), "export: 1,000 tokens, 256 tokens/s, 4s\n");
}

}  // namespace
}  // namespace dsa
