// What the tensorboard package reads back.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "tests/trainer/metrics/scratch_folder.h"
#include "trainer/metrics/metrics_writer.h"

namespace dsa {
namespace {

std::string python() {
  const char* deps = std::getenv("DSATRAIN_DEPS");
  const char* home = std::getenv("HOME");
  return (deps != nullptr ? std::string(deps) : std::string(home != nullptr ? home : "") + "/.cache/dsatrain") + "/tools/bin/python";
}

std::string output_of(const std::string& command, int& status) {
  std::FILE* pipe = popen(command.c_str(), "r");
  std::string out;
  for (char block[4096]; const size_t n = std::fread(block, 1, sizeof block, pipe);) out.append(block, n);
  status = pclose(pipe);
  return out;
}

class TensorBoard : public testing::Test {
 protected:
  void SetUp() override {
    int status = 0;
    output_of(python() + " -c 'import tensorboard' 2>/dev/null", status);
    if (status != 0) GTEST_SKIP() << "tensorboard is not installed in " << python();
  }
  nlohmann::json read() const {
    int status = 0;
    const std::string text = output_of(python() + " " + DSA_READ_EVENTS + " " + folder_.path() + " 2>/dev/null", status);
    EXPECT_EQ(status, 0);
    return nlohmann::json::parse(text);
  }
  static StepReport report(int64_t step) {
    StepReport r;
    r.step = step;
    r.steps = 10;
    r.stage = "sparse";
    r.lm_loss = 2.5 + static_cast<double>(step);
    r.kl_layer = {0.25, 0.5};
    r.recall_layer = {0.5, 0.75};
    r.top_k = 64;
    r.lr = 0.125;
    r.step_seconds = 2;
    r.data_seconds = 1;
    r.memory_bytes = int64_t{3} << 30;
    return r;
  }
  const ScratchFolder folder_;
};

TEST_F(TensorBoard, ReadsTagsStepsAndValues) {
  {
    MetricsWriter writer(folder_.path(), 1);
    for (int step = 1; step <= 3; ++step) writer.write(report(step));
    StepReport bad = report(4);
    bad.lm_loss = std::nan("");
    writer.write(bad);
    EXPECT_EQ(writer.failures(), 0);
  }
  const nlohmann::json seen = read();
  const nlohmann::json expected = {{1, "3.5"}, {2, "4.5"}, {3, "5.5"}, {4, "nan"}};
  EXPECT_EQ(seen["train/lm_loss"], expected);
  EXPECT_EQ(seen["train/kl_layer/01"][2], (nlohmann::json{3, "0.5"}));
  EXPECT_EQ(seen["dsa/recall_at_k"][0], (nlohmann::json{1, "0.625"}));
  EXPECT_EQ(seen["lr/backbone"][0], (nlohmann::json{1, "0.125"}));
  EXPECT_EQ(seen["perf/data_pct"][0], (nlohmann::json{1, "50.0"}));
  EXPECT_EQ(seen["mem/peak_gib"][0], (nlohmann::json{1, "3.0"}));
  EXPECT_EQ(seen["stability/skip"][0], (nlohmann::json{1, "0.0"}));
  EXPECT_FALSE(seen.contains("train/mtp_loss"));
  EXPECT_EQ(seen.size(), tags_of(report(1)).size());
}

TEST_F(TensorBoard, ForgetsWhatAResumedRunRepeats) {
  {
    MetricsWriter first(folder_.path(), 1);
    for (int step = 1; step <= 6; ++step) first.write(report(step));
  }
  {
    MetricsWriter resumed(folder_.path(), 4);
    StepReport again = report(4);
    again.lm_loss = 100;
    resumed.write(again);
  }
  const nlohmann::json expected = {{1, "3.5"}, {2, "4.5"}, {3, "5.5"}, {4, "100.0"}};
  EXPECT_EQ(read()["train/lm_loss"], expected);
}

TEST_F(TensorBoard, ToleratesAHalfWrittenLastRecord) {
  {
    MetricsWriter writer(folder_.path(), 1);
    for (int step = 1; step <= 3; ++step) writer.write(report(step));
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder_.path())) {
    if (entry.path().filename().string().find("tfevents") == std::string::npos) continue;
    std::filesystem::resize_file(entry.path(), std::filesystem::file_size(entry.path()) - 5);
  }
  EXPECT_EQ(read()["train/lm_loss"].size(), 2u);
}

}  // namespace
}  // namespace dsa
