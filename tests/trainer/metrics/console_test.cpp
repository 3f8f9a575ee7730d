// The console line and the summary, letter for letter; outputs that refuse.
#include <gtest/gtest.h>

#include <algorithm>
#include <unistd.h>

#include <cmath>

#include "tests/trainer/metrics/scratch_folder.h"
#include "trainer/metrics/console.h"

namespace dsa {
namespace {

StepReport sparse_report() {
  StepReport r;
  r.step = 40;
  r.steps = 15000;
  r.stage = "sparse";
  r.lm_loss = 1.68214;
  r.mtp_loss = 2.0134;
  r.kl_mean = 0.0412;
  r.kl_layer = {0.01, 0.214, 0.02};
  r.recall_layer = {0.95, 0.964};
  r.top_k = 2048;
  r.grad_norm_backbone = 0.61;
  r.grad_norm_indexer = 0.42;
  r.lr = 7.3e-6;
  r.indexer_lr = 7.3e-6;
  r.expert_load_max_over_mean = 1.321;
  r.tokens_total = 2'516'582'400;
  r.tokens_per_second = 1842.4;
  r.step_seconds = 34.2;
  r.data_seconds = 0.1368;
  r.memory_bytes = int64_t{13} << 27;
  r.checkpoint = "20 ok";
  return r;
}

TEST(Console, SparseLine) {
  EXPECT_EQ(format_step(sparse_report(), 2.0),
            "step 40/15000 sparse | lm 1.6821 | mtp 2.0134 | kl 0.0412 max L1 0.2140 | recall@2048 0.957 | gnorm 0.61 idx "
            "0.42 | lr 7.30e-06 | load 1.32 | skip 0 | 2.52B tok | 1,842 tok/s | 34.2 s/step | mem 1.6 GiB | data 0.4% | "
            "ckpt 20 ok | eta 8h18m");
}

TEST(Console, PartsThatAStageLacksAreLeftOut) {
  StepReport r;
  r.step = 1;
  r.steps = 40;
  r.stage = "warmup";
  r.kl_mean = 1.5;
  r.grad_norm_indexer = 12345.678;
  r.indexer_lr = 1e-2;
  r.held_out_loss = 2.71828;
  r.tokens_total = 512;
  EXPECT_EQ(format_step(r, 0), "step 1/40 warmup | kl 1.5000 | held-out 2.7183 | gnorm idx 1.23e+04 | lr idx 1.00e-02 | "
                               "skip 0 | 512 tok | 0 tok/s | 0 s/step | mem 0.0 GiB | data 0.0%");
}

TEST(Console, NotANumberShows) {
  StepReport r = sparse_report();
  r.lm_loss = std::nan("");
  r.kl_layer = {0.5, std::nan(""), 9};
  r.kl_mean = mean(r.kl_layer);
  r.skipped_total = 3;
  const std::string line = format_step(r, 0);
  EXPECT_NE(line.find("lm nan |"), std::string::npos) << line;
  EXPECT_NE(line.find("kl nan max L1 nan"), std::string::npos) << line;
  EXPECT_NE(line.find("skip 3"), std::string::npos);
}

TEST(Console, PrintsFirstLastEveryNthAndEvaluatedSteps) {
  const ScratchFolder folder;
  std::FILE* file = std::fopen((folder.path() + "/out").c_str(), "w+");
  {
    Console console(file, 10);
    for (int step = 1; step <= 25; ++step) {
      StepReport r;
      r.step = step;
      r.steps = 25;
      if (step == 13) r.held_out_loss = 1;
      console.step(r);
    }
  }
  std::fclose(file);
  const std::string out = read_whole(folder.path() + "/out");
  std::string steps;
  for (size_t at = 0; (at = out.find("step ", at)) != std::string::npos && at < out.size(); ++at) {
    if (at == 0 || out[at - 1] == '\n') steps += out.substr(at + 5, out.find('/', at) - at - 5) + " ";
  }
  EXPECT_EQ(steps, "1 10 13 20 25 ");
}

TEST(Console, AFullDeviceIsSaidOnce) {
  std::FILE* full = std::fopen("/dev/full", "w");
  ASSERT_NE(full, nullptr);
  testing::internal::CaptureStderr();
  Console console(full);
  for (int i = 0; i < 5; ++i) console.line("text");
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_EQ(console.failures(), 5);
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
  EXPECT_NE(said.find("No space left on device"), std::string::npos) << said;
  std::fclose(full);
}

TEST(Console, AClosedPipeDoesNotEndTheProcess) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  std::FILE* out = fdopen(ends[1], "w");
  close(ends[0]);
  testing::internal::CaptureStderr();
  Console console(out);
  console.line("text");
  EXPECT_EQ(console.failures(), 1);
  EXPECT_NE(testing::internal::GetCapturedStderr().find("Broken pipe"), std::string::npos);
  std::fclose(out);
}

TEST(Summary, LetterForLetter) {
  RunSummary s;
  s.exit_reason = "all 40 steps done";
  s.tokens = 163840;
  s.wall_seconds = 62;
  s.step_seconds = 57.7;
  s.data_seconds = 1.2;
  s.checkpoint_seconds = 3.1;
  s.last_loss = 2.68;
  s.best_loss = 2.671;
  s.best_step = 38;
  s.held_out_loss = 2.7;
  s.checkpoint = "runs/tiny/sparse/ckpt/step-00000040";
  s.run_folder = "runs/tiny/sparse";
  EXPECT_EQ(format_summary(s),
            "all 40 steps done\n"
            "  tokens      163,840 in 1m02s (2,643 tok/s)\n"
            "  goodput     93.1% in steps, of which 2.1% waiting for data; 5.0% writing checkpoints\n"
            "  lm loss     2.6800 at the end, best 2.6710 at step 38, held-out lm loss 2.7000\n"
            "  checkpoint  runs/tiny/sparse/ckpt/step-00000040\n"
            "  dashboards  tensorboard --logdir runs/tiny/sparse\n");
}

TEST(Meter, AddsUpAndRemembersTheBest) {
  RunMeter meter;
  const double losses[] = {3, 2, std::nan(""), 2.5};
  for (int i = 0; i < 4; ++i) {
    StepReport r;
    r.step = 11 + i;  // a resumed run
    r.stage = "sparse";
    r.lm_loss = losses[i];
    r.kl_mean = 0.5;
    r.tokens_total = 4096 * r.step;
    r.tokens_per_second = 2048;
    r.step_seconds = 2;
    r.data_seconds = 0.5;
    meter.add(r);
  }
  const RunSummary& s = meter.summary();
  EXPECT_EQ(s.tokens, 4 * 4096) << "those of this process";
  EXPECT_EQ(s.step_seconds, 8);
  EXPECT_EQ(s.data_seconds, 2);
  EXPECT_EQ(s.loss_name, "lm loss");
  EXPECT_EQ(s.last_loss, 2.5);
  EXPECT_EQ(s.best_loss, 2);
  EXPECT_EQ(s.best_step, 12);
  EXPECT_EQ(meter.seconds_per_step(), 2);
}

TEST(Meter, WarmupIsJudgedByItsKl) {
  RunMeter meter;
  StepReport r;
  r.stage = "warmup";
  r.lm_loss = 2.0;
  r.kl_mean = 0.5;
  meter.add(r);
  EXPECT_EQ(meter.summary().loss_name, "kl");
  EXPECT_EQ(meter.summary().best_loss, 0.5);
}

}  // namespace
}  // namespace dsa
