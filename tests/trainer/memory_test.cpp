// Settings that save memory: moments rounded to bf16 against a plain loop that rounds them, through a checkpoint bit for
// bit; master weights and moments in host memory; and what a run says when memory does not suffice.
#include <c10/util/BFloat16.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "tests/support/tensors.h"
#include "tests/trainer/tiny_run.h"
#include "trainer/device_memory.h"
#include "trainer/trainer.h"

namespace dsa {
namespace {

float narrow(float x) { return static_cast<float>(c10::BFloat16(x)); }

TEST(Memory, Bf16MomentsAreRoundedAfterEachStep) {
  Mesh mesh = Mesh::single();
  ParameterList list;
  const at::Tensor value = random_tensor({9, 5}, 1).to(at::kFloat).set_requires_grad(true);
  list.parameters.push_back({value, {whole("w", {9, 5})}, ParameterGroup::BACKBONE, true, false});
  AdamOptions options{0.9, 0.95, 1e-8, 0.1, false, 0};
  options.bf16_moments = true;
  ShardedAdamW optimizer(list, mesh, options);
  const OptimizerState state = optimizer.state();  // on a CPU its memory is the optimizer's own
  std::vector<float> w(45), m(45), v(45);
  std::memcpy(w.data(), value.detach().data_ptr<float>(), sizeof(float) * w.size());
  for (const StateShard& s : state.shards) {
    EXPECT_EQ(s.dtype, s.role == Role::PARAM ? Dtype::F32 : Dtype::BF16);
    if (s.role == Role::PARAM) std::memcpy(s.data, w.data(), sizeof(float) * w.size());
  }
  for (int step = 1; step <= 5; ++step) {
    const at::Tensor g = random_tensor({9, 5}, 100 + step).to(at::kFloat);
    value.mutable_grad() = g;
    optimizer.accumulate();
    optimizer.step(optimizer.reduce(), 1e-2, 0);
    for (size_t i = 0; i < w.size(); ++i) {
      const float x = g.const_data_ptr<float>()[i];
      const float m1 = 0.9f * m[i] + 0.1f * x, v1 = 0.95f * v[i] + 0.05f * x * x;  // this step sees them unrounded
      const double corrected = m1 / (1 - std::pow(0.9, step)), root = std::sqrt(v1 / (1 - std::pow(0.95, step)));
      w[i] = static_cast<float>(w[i] - 1e-2 * (corrected / (root + 1e-8) + 0.1 * w[i]));
      m[i] = narrow(m1);
      v[i] = narrow(v1);
      // Moments that were not rounded would be off by about 1e-5.
      EXPECT_NEAR(value.const_data_ptr<float>()[i], w[i], 1e-6) << i << " step " << step;
    }
  }
}

TEST(Memory, Bf16MomentsAndOffloadGoThroughACheckpointUnchanged) {
  Mesh mesh = Mesh::single();
  test::Scratch scratch(mesh.along(Axis::WORLD));
  test::write_inputs(scratch);
  const auto run = [&](const std::string& folder, int steps, bool narrow_moments) {
    std::vector<std::string> sets{"compute.precision=FP32", "optimizer.offload=true", "schedule.steps=" + std::to_string(steps)};
    if (narrow_moments) sets.push_back("optimizer.moments=BF16");
    auto trainer = std::make_unique<Trainer>(test::recipe(scratch, "PRETRAIN", "", scratch / folder, sets), mesh);
    trainer->run();
    return trainer;
  };
  const auto once = run("once", 3, true);
  run("twice", 2, true).reset();
  auto resumed = run("twice", 3, true);
  const OptimizerState a = once->optimizer().state(), b = resumed->optimizer().state();
  for (size_t i = 0; i < a.shards.size(); ++i)
    EXPECT_EQ(0, std::memcmp(a.shards[i].data, b.shards[i].data, static_cast<size_t>(numel(a.shards[i].box) * bits(a.shards[i].dtype) / 8)))
        << a.shards[i].box.name;
  resumed.reset();
  // A run with fp32 moments goes on from narrow ones, and the other way.
  EXPECT_EQ(run("twice", 4, false)->steps_done(), 4);
  EXPECT_EQ(run("twice", 5, true)->steps_done(), 5);
}

TEST(Memory, WhatIsMissingAndWhatHelps) {
  Recipe r;
  r.stage = StageKind::SPARSE;
  r.data.sequence_length = 8192;
  r.batch.micro_sequences = 4;
  r.compute.recompute = Recompute::NONE;
  const MemoryUse use{"step 7", int64_t{3} << 30, int64_t{12} << 30, int64_t{77} << 30};
  const std::string libtorch = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.19 GiB.";
  const RunFailure failure = out_of_memory(libtorch, use, r);
  EXPECT_EQ(failure.exit_code(), kExitOutOfMemory);
  const std::string message = failure.what();
  for (const char* part : {"step 7 of stage sparse", "2.50 GiB more were needed", "parameters 3.0 GiB", "optimizer 12.0 GiB",
                           "peak so far 77.0 GiB", "4 sequences of 8192 tokens", "set compute.recompute: LAYER, or batch.micro_sequences: 2"})
    EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
  r.compute.recompute = Recompute::LAYER;
  r.batch.micro_sequences = 1;
  r.compute.query_block = 128;
  const std::string next = "set optimizer.offload: true, or compute.offload_hidden: true";
  EXPECT_NE(std::string(out_of_memory(libtorch, use, r).what()).find(next), std::string::npos);
}

}  // namespace
}  // namespace dsa
