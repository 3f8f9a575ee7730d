// Runs of all three stages on a GPU, bf16, with the head sizes of the native kernels: the same bits on every run, the same
// bits after a resume, and a device whose memory is full says so. Sequence 512, top-k 64.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/ones.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "data/model_config.h"
#include "parallel/device.h"
#include "tests/support/dsa_guard.h"
#include "tests/trainer/tiny_run.h"
#include "trainer/model/hidden_states.h"
#include "trainer/run_failure.h"
#include "trainer/trainer.h"

namespace dsa {
namespace {

class GpuRun : public testing::Test {
 protected:
  void SetUp() override {
    if (visible_gpus() == 0) GTEST_SKIP() << "no CUDA device";
    static const at::Device gpu = open_gpu(0, 1);
    mesh_.emplace(Mesh::single(gpu));
    scratch_.emplace(mesh_->along(Axis::WORLD));
    test::write_inputs(*scratch_);
    ModelConfig c = ModelConfig::from_json_file(*scratch_ / "config.json");
    c.num_attention_heads = 16;
    c.q_lora_rank = 64;
    c.kv_lora_rank = 512;
    c.qk_nope_head_dim = c.v_head_dim = 128;
    c.qk_rope_head_dim = 64;
    std::ofstream(*scratch_ / "config.json") << c.to_json(HfFormat::V31, HfDtype::BF16);
  }
  ResolvedRecipe stage(const std::string& name, const std::string& from, const std::string& folder, int64_t steps,
                       std::vector<std::string> sets = {}, const std::string& recompute = "NONE") {
    sets.insert(sets.end(), {"data.sequence_length=512", "batch.micro_sequences=2", "compute.device=GPU",
                             "compute.precision=BF16", "compute.recompute=" + recompute,
                             "schedule.steps=" + std::to_string(steps)});
    if (name == "WARMUP")
      sets.insert(sets.end(), {"model.indexer.heads=16", "model.indexer.head_dim=128", "model.indexer.top_k=64"});
    return test::recipe(*scratch_, name, from, *scratch_ / folder, sets);
  }
  // The bytes of two runs' states.
  static int64_t shards_apart(const Trainer& a, const Trainer& b) {
    const OptimizerState want = a.optimizer().state(), got = b.optimizer().state();
    EXPECT_EQ(got.shards.size(), want.shards.size());
    int64_t differ = 0;
    for (size_t i = 0; i < std::min(want.shards.size(), got.shards.size()); ++i) {
      const StateShard& s = want.shards[i];
      differ += std::memcmp(s.data, got.shards[i].data, static_cast<size_t>(numel(s.box) * bits(s.dtype) / 8)) != 0;
    }
    return differ;
  }
  // The elements of the state that differ after runs of 4 steps in one go and as told.
  void expect_equal(const std::string& name, const std::string& from) {
    SCOPED_TRACE(name);
    Trainer once(stage(name, from, name, 4), *mesh_), again(stage(name, from, name + "-again", 4), *mesh_);
    once.run();
    again.run();
    Trainer(stage(name, from, name + "-resumed", 2), *mesh_).run();
    Trainer resumed(stage(name, from, name + "-resumed", 4), *mesh_);
    EXPECT_EQ(resumed.steps_done(), 2);
    resumed.run();
    EXPECT_EQ(shards_apart(once, again), 0) << "of the second run";
    EXPECT_EQ(shards_apart(once, resumed), 0) << "after the resume";
    EXPECT_EQ(once.held_out_loss(), again.held_out_loss());
  }
  std::optional<Mesh> mesh_;
  std::optional<test::Scratch> scratch_;
};

TEST_F(GpuRun, RepeatsAndResumesBitForBit) {
  DSA_GUARD(512, 64);
  expect_equal("PRETRAIN", "");
  expect_equal("WARMUP", *scratch_ / "PRETRAIN");
  expect_equal("SPARSE", *scratch_ / "WARMUP");
}

TEST_F(GpuRun, HiddenStatesOnTheHostChangeNoBit) {
  DSA_GUARD(512, 64);
  Trainer(stage("PRETRAIN", "", "PRETRAIN", 2), *mesh_).run();
  Trainer(stage("WARMUP", *scratch_ / "PRETRAIN", "WARMUP", 2), *mesh_).run();
  for (const std::string name : {"PRETRAIN", "SPARSE"}) {
    const auto run = [&](bool offload) {
      const std::string from = name == "SPARSE" ? *scratch_ / "WARMUP" : std::string();
      const std::string set = offload ? "compute.offload_hidden=true" : "compute.offload_hidden=false";
      auto trainer = std::make_unique<Trainer>(
          stage(name, from, name + (offload ? "-host" : "-device"), 4, {set}, "LAYER"), *mesh_);
      trainer->run();
      return trainer;
    };
    EXPECT_EQ(shards_apart(*run(false), *run(true)), 0) << name;
  }
}

// Many layers' inputs leave and come back, last first, beside work that takes the memory they leave.
TEST_F(GpuRun, HiddenStatesLeaveTheDevice) {
  constexpr int64_t kRows = 4096, kWidth = 4096, kStates = 12, kBytes = kRows * kWidth * 2;
  const auto allocated = [&] {
    const at::Device device = mesh_->device();
    return at::getDeviceAllocator(device.type())->getDeviceStats(device.index()).allocated_bytes[0].current;
  };
  const auto state = [&](int64_t i) {
    const at::Tensor number = at::arange(kRows * kWidth, at::TensorOptions(at::kFloat).device(mesh_->device()));
    return number.add(static_cast<double>(i * 1000)).remainder(251).to(at::kBFloat16).view({kRows, kWidth});
  };
  at::Tensor work = at::ones({2048, 2048}, at::TensorOptions(at::kFloat).device(mesh_->device()));
  const int64_t before = allocated();
  {
    HiddenStates hidden(mesh_->device());
    for (int64_t i = 0; i < kStates; ++i) {
      EXPECT_EQ(hidden.put(state(i)), static_cast<size_t>(i));
      for (int k = 0; k < 4; ++k) work = work.mm(work).clamp(0, 1);
      work.sum().item<float>();  // as a layer of experts does: the host does not run far ahead
    }
    EXPECT_LT(allocated() - before, 4 * kBytes);  // not twelve
    for (int64_t i = kStates - 1; i >= 2; --i) {
      for (int k = 0; k < 4; ++k) work = work.mm(work).clamp(0, 1);
      const at::Tensor x = hidden.take(i);
      EXPECT_TRUE(at::equal(x, state(i))) << i;
      x.zero_();
      EXPECT_LT(allocated() - before, 8 * kBytes);
    }
    EXPECT_THROW(hidden.take(5), std::logic_error);
  }  // two were never taken, one of them on its way
  EXPECT_LE(allocated() - before, kBytes);
}

// Master weights and moments on the host, or the moments in bf16: the loss goes where the plain optimizer takes it.
TEST_F(GpuRun, OffloadedAndNarrowStateTrain) {
  const auto loss_after = [&](const std::string& folder, std::vector<std::string> sets) {
    Trainer trainer(stage("PRETRAIN", "", folder, 4, std::move(sets)), *mesh_);
    trainer.run();
    return trainer.held_out_loss();
  };
  const double plain = loss_after("plain", {});
  EXPECT_NEAR(loss_after("offloaded", {"optimizer.offload=true"}), plain, 1e-3 * plain);
  EXPECT_NEAR(loss_after("narrow", {"optimizer.moments=BF16"}), plain, 1e-3 * plain);
}

TEST_F(GpuRun, FullMemoryIsExplained) {
  Trainer trainer(stage("PRETRAIN", "", "full", 2), *mesh_);
  std::vector<at::Tensor> hogs;
  for (int64_t bytes = int64_t{16} << 30; bytes >= int64_t{1} << 20;) try {
      hogs.push_back(at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(mesh_->device())));
    } catch (const c10::OutOfMemoryError&) {
      bytes /= 2;
    }
  try {
    trainer.run();
    ADD_FAILURE() << "it ran in no memory";
  } catch (const RunFailure& e) {
    EXPECT_EQ(e.exit_code(), kExitOutOfMemory);
    const std::string message = e.what();
    for (const char* part : {"step 1 of stage pretrain", "more were needed", "compute.recompute: LAYER", "batch.micro_sequences: 1"})
      EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
  }
}

}  // namespace
}  // namespace dsa
