// The whole model against programs that others wrote (transformers, Megatron): what `probe` writes on every mesh of
// this world size equals tests/golden, fp64 to 1e-11 of the largest (2e-7 where the file is F32), fp32 to 1e-5; on a GPU
// (DSATRAIN_TEST_GPU set) fp32 to 1e-4 with TF32 off. bf16 stays within bounds made of its rounding, 2^-8.
#include <gtest/gtest.h>

#include <mpi.h>

#include <cstdlib>
#include <filesystem>
#include <functional>

#include "data/safetensors.h"
#include "parallel/device.h"
#include "tests/support/dsa_guard.h"
#include "tests/support/golden.h"
#include "tests/support/tensors.h"
#include "tests/trainer/tiny_run.h"
#include "trainer/checkpoint/export.h"
#include "trainer/probe.h"

namespace dsa {
namespace {

const std::string kGolden = DSA_GOLDEN;
constexpr int64_t kTime = 96, kTopK = 16;

struct Tolerance {
  double f64, f32, gradient, kl, kl_gradient;
};
constexpr Tolerance kFp64{1e-11, 2e-7, 1e-11, 1e-11, 1e-11}, kFp32{1e-5, 1e-5, 1e-4, 1e-5, 1e-4};
// A GPU sums in other orders, and its exp and log are within 2 ulp; fp32 gradients pass four layers twice.
constexpr Tolerance kGpuFp64{1e-10, 2e-7, 1e-10, 1e-10, 1e-10}, kGpuFp32{1e-4, 1e-4, 1e-4, 1e-4, 1e-4};

const bool on_gpu = std::getenv("DSATRAIN_TEST_GPU") != nullptr;
at::Device device() {
  static const at::Device instance = on_gpu ? open_gpu(0, 1) : at::Device(at::kCPU);
  return instance;
}

class ProbeGolden : public testing::Test {
 protected:
  void SetUp() override {
    if (on_gpu && visible_gpus() == 0) GTEST_SKIP() << "no CUDA device";
  }
  static Communicator& world() {
    static Mesh mesh([] {
      int size = 0;
      MPI_Comm_size(MPI_COMM_WORLD, &size);
      return Degrees{size, 1, 1, 1};
    }());
    return mesh.along(Axis::WORLD);
  }
  static std::vector<Degrees> all_meshes() {
    if (world().size() == 2) return {{1, 1, 2, 1}, {1, 2, 1, 2}, {2, 1, 1, 2}};
    if (world().size() == 4) return {{1, 2, 2, 2}, {1, 1, 4, 4}, {1, 4, 1, 1}};
    return {{1, 1, 1, 1}};
  }
  // Runs probe on each mesh and hands the results to `check` on rank 0.
  static void on_meshes(const std::vector<Degrees>& meshes, ProbeOptions options,
                        const std::function<void(const Golden&)>& check) {
    test::Scratch scratch(world());
    int number = 0;
    for (const Degrees& d : meshes) {
      Mesh mesh(d, /*check_calls=*/false, device());
      options.out = scratch / ("out" + std::to_string(number++) + ".safetensors");
      probe(options, mesh);
      if (world().rank() == 0) {
        SCOPED_TRACE("data " + std::to_string(d.data) + " context " + std::to_string(d.context) + " tensor " +
                     std::to_string(d.tensor) + " expert " + std::to_string(d.expert));
        check(Golden(options.out));
      }
    }
    world().barrier();
  }
};

void check_forward(const Golden& got, const Golden& golden, const Tolerance& t) {
  EXPECT_LT(relative_distance(got["logits"], golden["logits"]), t.f32);
  EXPECT_LT(relative_distance(got["logits"].narrow(1, kTime - 8, 8), golden["logits_tail_f64"]), t.f64);
  EXPECT_LT(relative_distance(got["lm_loss"], golden["lm_loss"]), t.f64);
  for (int l = 1; l <= 4; ++l) {
    const std::string name = "hidden." + std::to_string(l);
    EXPECT_LT(relative_distance(got[name], golden[name]), t.f32) << name;
  }
  for (int l = 1; l <= 3; ++l) {
    const std::string name = "router." + std::to_string(l);
    EXPECT_TRUE(at::equal(got[name + ".experts"], golden[name + ".experts"])) << name;
    EXPECT_LT(relative_distance(got[name + ".weights"], golden[name + ".weights"]), t.f64) << name;
  }
}

// The gradients of the whole model: those stored entirely, and the norm of every one.
void check_gradients(const Golden& got, const Golden& golden, const SafetensorsFile& file, const Tolerance& t) {
  int whole = 0, norms = 0;
  for (const TensorEntry& e : file.entries()) {
    if (e.name.starts_with("grad.")) {
      const double tolerance = e.dtype == Dtype::F64 ? t.gradient : std::max(t.gradient, t.f32);
      EXPECT_LT(relative_distance(got[e.name], golden[e.name]), tolerance) << e.name;
      ++whole;
    } else if (e.name.starts_with("gradnorm.")) {
      const std::string parameter = e.name.substr(9);
      EXPECT_LT(relative_distance(got["grad." + parameter].to(at::kDouble).norm().reshape({1}), golden[e.name]), t.gradient)
          << e.name;
      ++norms;
    }
  }
  EXPECT_GT(whole, 0);
  EXPECT_GT(norms, 40);
}

void check_indexer(const Golden& got, const Golden& kl, const std::string& set, const Tolerance& t) {
  for (int l = 0; l < 4; ++l) {
    const std::string layer = set + "." + std::to_string(l);
    EXPECT_LT(relative_distance(got[layer + ".rows"], kl[layer + ".rows"]), t.kl) << layer;
    for (const char* x : {"wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"})
      EXPECT_LT(relative_distance(got[layer + ".grad." + x], kl[layer + ".grad." + x]), t.kl_gradient) << layer << x;
  }
}

TEST_F(ProbeGolden, SparseEqualsTransformers) {
  DSA_GUARD(kTime, kTopK);
  for (const bool wide : {true, false}) {
    const Tolerance t = on_gpu ? wide ? kGpuFp64 : kGpuFp32 : wide ? kFp64 : kFp32;
    ProbeOptions o;
    o.model = kGolden + "/hf_v32_tiny";
    o.tokens = kGolden + "/expected_v32_tiny.safetensors";
    o.attention = AttentionMode::SPARSE;
    o.gradients = true;
    o.query_block = 40;
    o.model_options.dtype = wide ? at::kDouble : at::kFloat;
    on_meshes(all_meshes(), o, [&](const Golden& got) {
      const Golden golden("expected_v32_tiny"), kl("indexer_kl_tiny");
      check_forward(got, golden, t);
      EXPECT_LT(relative_distance(got["final_norm"], golden["final_norm"]), t.f32);
      for (int l = 0; l < 4; ++l) {
        const std::string name = "indexer." + std::to_string(l);
        EXPECT_TRUE(at::equal(got[name + ".topk_mask"], golden[name + ".topk_mask"])) << name;
        EXPECT_LT(relative_distance(got[name + ".scores"], golden[name + ".scores"]), wide ? t.f32 : 1e-4) << name;
      }
      check_gradients(got, golden, SafetensorsFile(o.tokens), t);
      check_indexer(got, kl, "sparse", t);
    });
  }
}

TEST_F(ProbeGolden, DenseEqualsTransformers) {
  for (const bool wide : {true, false}) {
    const Tolerance t = on_gpu ? wide ? kGpuFp64 : kGpuFp32 : wide ? kFp64 : kFp32;
    ProbeOptions o;
    o.model = kGolden + "/hf_v31_tiny";
    o.tokens = kGolden + "/expected_v31_tiny.safetensors";
    o.attention = AttentionMode::DENSE;
    o.gradients = true;
    o.query_block = 40;
    o.indexer_from = kGolden + "/hf_v32_tiny/model-00003-of-000003.safetensors";
    o.top_k = kTopK;
    o.model_options.dtype = wide ? at::kDouble : at::kFloat;
    on_meshes(all_meshes(), o, [&](const Golden& got) {
      const Golden golden("expected_v31_tiny"), kl("indexer_kl_tiny");
      check_forward(got, golden, t);
      check_gradients(got, golden, SafetensorsFile(o.tokens), t);
      check_indexer(got, kl, "warmup", t);
    });
  }
}

// bf16 weights and activations. A value is rounded (2^-9 relative) at some 20 places a layer; the errors of four layers
// add up like a random walk to about sqrt(80) 2^-9 = 0.017 of a row's norm, bounded here by three times that. A token
// whose rounding makes the router choose another expert jumps, and later tokens attend to it: the bound is the median
// row's, and that of the mean loss.
TEST_F(ProbeGolden, Bf16StaysWithinItsRounding) {
  DSA_GUARD(kTime, kTopK);
  constexpr double kBound = 0.05;
  ProbeOptions o;
  o.model = kGolden + "/hf_v31_tiny";
  o.tokens = kGolden + "/expected_v31_tiny.safetensors";
  o.attention = AttentionMode::DENSE;
  o.query_block = 40;
  o.model_options.dtype = at::kBFloat16;
  on_meshes({all_meshes()[0]}, o, [&](const Golden& got) {
    const Golden golden("expected_v31_tiny");
    const auto median_row = [](const at::Tensor& a, const at::Tensor& b) {
      const at::Tensor want = b.to(at::kDouble);
      return ((a.to(at::kDouble) - want).norm(2, -1) / want.norm(2, -1)).median().item<double>();
    };
    EXPECT_LT(median_row(got["logits"], golden["logits"]), kBound);
    EXPECT_LT(relative_distance(got["lm_loss"], golden["lm_loss"]), kBound / 10);
    for (int l = 1; l <= 4; ++l) {
      const std::string name = "hidden." + std::to_string(l);
      EXPECT_LT(median_row(got[name], golden[name]), kBound) << name;
    }
  });
}

// FP8 folder with partial blocks and an MTP layer, exported to BF16 (as the expected values were made) and run.
TEST_F(ProbeGolden, MtpOfTheFp8Folder) {
  test::Scratch scratch(world());
  ProbeOptions o;
  o.model = scratch / "bf16";
  o.tokens = kGolden + "/expected_forward_tiny_fp8.safetensors";
  o.attention = AttentionMode::DENSE;
  o.model_options.dtype = at::kDouble;
  if (world().rank() == 0) {
    ExportOptions to_bf16;
    to_bf16.dtype = HfDtype::BF16;
    export_checkpoint(*open_weights(kGolden + "/hf_v31_tiny_fp8"), o.model, to_bf16);
  }
  world().barrier();
  // 6 heads and 6 experts: not every degree divides them.
  const std::vector<Degrees> meshes =
      world().size() == 4 ? std::vector<Degrees>{{1, 2, 2, 2}, {2, 2, 1, 2}} : all_meshes();
  on_meshes(meshes, o, [&](const Golden& got) {
    const Golden golden("expected_forward_tiny_fp8");
    for (const char* name : {"logits", "final_norm", "mtp.logits", "lm_loss", "mtp.loss_mean"})
      EXPECT_LT(relative_distance(got[name], golden[name]), golden[name].scalar_type() == at::kDouble ? (on_gpu ? 1e-10 : 1e-11) : 2e-7) << name;
    EXPECT_GT(relative_distance(got["mtp.logits"], golden["mtp.logits_from_prenorm_h"]), 0.05);
  });
}

}  // namespace
}  // namespace dsa
