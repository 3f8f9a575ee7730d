// metrics.jsonl: contents, NaN, resuming, and disks that refuse.
#include <gtest/gtest.h>

#include <algorithm>
#include <sys/resource.h>

#include <cmath>
#include <csignal>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tests/trainer/metrics/scratch_folder.h"
#include "trainer/metrics/append_file.h"
#include "trainer/metrics/metrics_writer.h"

namespace dsa {
namespace {

StepReport report(int64_t step) {
  StepReport r;
  r.step = step;
  r.steps = 10;
  r.stage = "warmup";
  r.kl_mean = 0.1;
  r.kl_layer = {0.1, 0.1};
  return r;
}

std::vector<nlohmann::json> lines(const ScratchFolder& folder) {
  std::vector<nlohmann::json> out;
  std::istringstream text(read_whole(folder.path() + "/metrics.jsonl"));
  for (std::string line; std::getline(text, line);) out.push_back(nlohmann::json::parse(line));
  return out;
}

std::vector<int64_t> steps(const ScratchFolder& folder) {
  std::vector<int64_t> out;
  for (const auto& line : lines(folder)) out.push_back(line["step"]);
  return out;
}

TEST(MetricsWriter, WritesWhatIsThereAndNothingElse) {
  const ScratchFolder folder;
  MetricsWriter writer(folder.path(), 1);
  StepReport r = report(1);
  r.lm_loss = 1.0 / 3;
  r.grad_norm_indexer = 2;
  r.tokens_total = int64_t{1} << 53;
  r.checkpoint = "1 ok";
  writer.write(r);
  const auto line = lines(folder).at(0);
  EXPECT_EQ(line["lm_loss"].get<double>(), 1.0 / 3) << "all digits survive";
  EXPECT_EQ(line["tokens_total"].get<int64_t>(), int64_t{1} << 53);
  EXPECT_EQ(line["checkpoint"], "1 ok");
  EXPECT_EQ(line["kl_layer"].size(), 2u);
  EXPECT_FALSE(line.contains("mtp_loss"));
  EXPECT_FALSE(line.contains("grad_norm_backbone"));
  EXPECT_FALSE(line.contains("recall_layer"));
}

TEST(MetricsWriter, NotANumberIsWrittenAndNeverAveragedAway) {
  const ScratchFolder folder;
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  MetricsWriter writer(folder.path(), 1);
  StepReport r = report(1);
  r.lm_loss = nan;
  r.grad_norm_backbone = inf;
  r.grad_norm_indexer = -inf;
  r.recall_layer = {0.5, nan, 0.5};
  writer.write(r);
  const auto line = lines(folder).at(0);
  EXPECT_EQ(line["lm_loss"], "nan");
  EXPECT_EQ(line["grad_norm_backbone"], "inf");
  EXPECT_EQ(line["grad_norm_indexer"], "-inf");
  EXPECT_EQ(line["recall_layer"], nlohmann::json({0.5, "nan", 0.5}));
  EXPECT_TRUE(std::isnan(mean(r.recall_layer)));
  for (const Scalar& scalar : tags_of(r)) {
    EXPECT_TRUE(scalar.tag != "dsa/recall_at_k" || std::isnan(scalar.value));
  }
}

TEST(MetricsWriter, ResumeForgetsTheStepsItRepeats) {
  const ScratchFolder folder;
  {
    MetricsWriter writer(folder.path(), 1);
    for (int step = 1; step <= 13; ++step) writer.write(report(step));
  }
  {
    MetricsWriter writer(folder.path(), 11);
    EXPECT_EQ(steps(folder), (std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}));
    writer.write(report(11));
  }
  EXPECT_EQ(steps(folder).back(), 11);
  EXPECT_EQ(steps(folder).size(), 11u);
}

TEST(MetricsWriter, ResumeDropsAHalfWrittenLineAndGarbage) {
  const ScratchFolder folder;
  std::ofstream(folder.path() + "/metrics.jsonl") << "{\"step\":1}\nnot json\n[1]\n{\"step\":\"2\"}\n{\"step\":2}\n{\"step\":3";
  MetricsWriter writer(folder.path(), 4);
  EXPECT_EQ(steps(folder), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(writer.failures(), 0);
}

TEST(MetricsWriter, MissingFolderIsCountedAndSaidOnce) {
  testing::internal::CaptureStderr();
  MetricsWriter writer("/nowhere/at/all", 1);
  for (int step = 1; step <= 3; ++step) writer.write(report(step));
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_GE(writer.failures(), 1);
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1);
  EXPECT_NE(said.find("No such file or directory"), std::string::npos) << said;
  EXPECT_NE(said.find("training goes on"), std::string::npos);
}

// A file size limit stands in for a full disk: write() succeeds in part, then fails.
class FullDisk {
 public:
  explicit FullDisk(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    rlimit now = before_;
    now.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &now);
  }
  ~FullDisk() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  rlimit before_{};
};

TEST(AppendFile, ARecordIsThereCompletelyOrNotAtAll) {
  const ScratchFolder folder;
  AppendFile file(folder.path() + "/f");
  file.append("first|");
  {
    const FullDisk full(10);
    EXPECT_THROW(file.append("second|"), std::system_error);
    EXPECT_EQ(read_whole(file.path()), "first|");
  }
  file.append("third|");
  EXPECT_EQ(read_whole(file.path()), "first|third|");
}

TEST(MetricsWriter, SurvivesAFullDiskAndGoesOnAfterwards) {
  const ScratchFolder folder;
  MetricsWriter writer(folder.path(), 1);
  writer.write(report(1));
  testing::internal::CaptureStderr();
  {
    const FullDisk full(std::filesystem::file_size(folder.path() + "/metrics.jsonl") + 20);
    for (int step = 2; step <= 4; ++step) writer.write(report(step));
  }
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_GE(writer.failures(), 3);
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
  writer.write(report(5));
  EXPECT_EQ(steps(folder), (std::vector<int64_t>{1, 5}));
}

}  // namespace
}  // namespace dsa
