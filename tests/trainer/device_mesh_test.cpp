// What a mesh computes in the precisions of real training, on the host and on GPUs, equals one device: losses and
// gradient norms of WARMUP and SPARSE steps on meshes of two and of four ranks.
//
// fp64: 1e-9 relative over two steps. fp32: 1e-5 over two steps, over the first one in SPARSE, where after an update one
// device's own fp32 norms lie 1e-4 from fp64's. bf16: the first step, within bounds that follow from the roundings. Both
// runs start from equal weights, and a mesh changes only how intermediate numbers are rounded:
//
//   u = 2^-8      largest relative error of one rounding to bf16; uniformly distributed, so u / sqrt(3) at large
//   n             roundings one after another from the tokens to the loss: 5 in each of a layer's two branches (norm,
//                 projection in, product, projection out, sum), 2 more at the ends
//   e             relative error of an activation between two runs: sqrt(2 n) u / sqrt(3)
//   f             SPARSE: keys of a row that change sides, 0.4 e S / 2, with S / 2 keys in a row on average and normally
//                 distributed scores; the mean of k values moves by s = sqrt(2 f / k); e becomes sqrt(e^2 + s^2)
//   T             tokens of the step. Errors of different tokens are independent, a mean over T has them / sqrt(T);
//                 4 standard deviations are allowed
//
//   loss          4 e / sqrt(T) nats, as logits of these models are below 1 nat
//   norm          4 g / sqrt(T) + g^2 / 2 of it, with g = sqrt(2) e: forward and a backward pass as long
//   KL            8 e / sqrt(T) + e^2 of it: a row's is half the variance of log p - log q, whose error is e of its spread
#include <gtest/gtest.h>
#include <mpi.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <tuple>

#include "data/model_config.h"
#include "tests/parallel/devices.h"
#include "tests/support/dsa_guard.h"
#include "tests/trainer/tiny_run.h"
#include "trainer/trainer.h"

namespace dsa {
namespace {

using test::On;

struct Shape {
  int64_t sequence, top_k, indexer_heads, indexer_dim;
  int64_t roundings;  // n of the text above
};

constexpr int64_t kSequences = 4;

/// The tiny model on the host; on GPUs the head sizes of the real one, for which the native kernels are written.
Shape shape_of(On on) {
  return on == On::HOST ? Shape{test::kSequence, test::kTopK, 4, 16, 52} : Shape{512, 128, 32, 128, 42};
}

void write_gpu_model(const test::Scratch& scratch) {
  ModelConfig c = ModelConfig::from_json_file(std::string(DSA_GOLDEN) + "/hf_v31_tiny/config.json");
  c.num_nextn_predict_layers = 1;
  c.num_hidden_layers = 3;
  c.hidden_size = 512;
  c.intermediate_size = 1024;
  c.moe_intermediate_size = 256;
  c.num_attention_heads = 32;
  c.q_lora_rank = 256;
  c.kv_lora_rank = 512;
  c.qk_nope_head_dim = 128;
  c.qk_rope_head_dim = 64;
  c.v_head_dim = 128;
  std::ofstream(scratch / "config.json") << c.to_json(HfFormat::V31, HfDtype::FP32);
}

int ranks() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

std::vector<Degrees> shapes_of_meshes() {
  if (ranks() == 2) return {{.data = 2}, {.data = 2, .expert = 2}, {.context = 2}, {.tensor = 2}};
  return {{.data = 4, .expert = 4}, {.data = 2, .context = 2, .expert = 2}, {.data = 2, .tensor = 2, .expert = 2},
          {.context = 2, .tensor = 2, .expert = 4}};
}

struct Numbers {
  double lm_loss, mtp_loss, kl, backbone_norm, indexer_norm;
};

std::vector<Numbers> train(const ResolvedRecipe& recipe, Mesh& mesh, bool save) {
  Trainer trainer(recipe, mesh);
  std::vector<Numbers> out;
  for (int64_t n = 1; n <= recipe.recipe.schedule.steps; ++n) {
    const StepReport r = trainer.step(n);
    out.push_back({r.lm_loss.value_or(0), r.mtp_loss.value_or(0), r.kl_mean.value_or(0), r.grad_norm_backbone.value_or(0),
                   r.grad_norm_indexer.value_or(0)});
  }
  if (save) trainer.save(recipe.recipe.schedule.steps);
  return out;
}

/// The largest deviation that rounding explains.
Numbers tolerance(const Numbers& of, const Shape& shape, bool sparse, const std::string& precision) {
  if (precision != "BF16") {
    const double x = precision == "FP64" ? 1e-9 : 1e-5;
    return {x * of.lm_loss, x * of.mtp_loss, x * of.kl, x * of.backbone_norm, x * of.indexer_norm};
  }
  const double tokens = static_cast<double>(kSequences * shape.sequence), many = 4 / std::sqrt(tokens);
  double e = std::sqrt(2.0 * static_cast<double>(shape.roundings) / 3) / 256;
  if (sparse) e = std::sqrt(e * e + 0.4 * e * static_cast<double>(shape.sequence) / static_cast<double>(shape.top_k));
  const double g = std::sqrt(2.0) * e, norm = many * g + g * g / 2;
  return {many * e, many * e, (2 * many * e + e * e) * of.kl, norm * of.backbone_norm, norm * of.indexer_norm};
}

class DeviceMesh : public testing::TestWithParam<std::tuple<On, std::string>> {
 protected:
  using Labelled = std::pair<std::string, std::unique_ptr<Mesh>>;

  /// The meshes, there. The tests share them: every group of a mesh on GPUs takes a while to open.
  static const std::vector<Labelled>& meshes_on(at::Device device) {
    std::vector<Labelled>& meshes = meshes_[device.is_cpu() ? 0 : 1];
    if (!meshes.empty()) return meshes;
    for (const Degrees& d : shapes_of_meshes())
      meshes.emplace_back("data " + std::to_string(d.data) + " context " + std::to_string(d.context) + " tensor " +
                              std::to_string(d.tensor) + " expert " + std::to_string(d.expert),
                          std::make_unique<Mesh>(d, /*check_calls=*/false, device));
    return meshes;
  }
  static void TearDownTestSuite() {  // before MPI ends
    for (auto& meshes : meshes_) meshes.clear();
  }

 private:
  inline static std::array<std::vector<Labelled>, 2> meshes_;
};

TEST_P(DeviceMesh, EqualsOneDevice) {
  const auto [on, precision] = GetParam();
  const auto where = test::device_for(on);
  if (!where) GTEST_SKIP() << test::kNoGpus;
  const at::Device device = *where;
  const Mesh control({.data = ranks()});
  Communicator& world = control.along(Axis::WORLD);
  const bool first = world.rank() == 0;
  test::Scratch scratch(world);
  const Shape shape = shape_of(on);
  if (first) test::write_inputs(scratch);
  if (first && on == On::GPU) write_gpu_model(scratch);
  DSA_GUARD(shape.sequence, shape.top_k);
  world.barrier();

  Mesh single = Mesh::single(device);
  const std::vector<Labelled>& meshes = meshes_on(device);
  std::string from;
  for (const std::string stage : {"PRETRAIN", "WARMUP", "SPARSE"}) {
    const bool one_step = stage == "PRETRAIN" || precision == "BF16" || (stage == "SPARSE" && precision == "FP32");
    std::vector<std::string> sets{"compute.precision=" + precision, "compute.query_block=64",
                                  "data.sequence_length=" + std::to_string(shape.sequence),
                                  "schedule.steps=" + std::to_string(one_step ? 1 : 2)};
    if (stage == "WARMUP")
      for (const auto& [field, value] : {std::pair("heads", shape.indexer_heads), std::pair("head_dim", shape.indexer_dim),
                                         std::pair("top_k", shape.top_k)})
        sets.push_back(std::string("model.indexer.") + field + "=" + std::to_string(value));
    const std::string alone = scratch / (stage + "-single");
    std::vector<Numbers> expected;
    if (first) expected = train(test::recipe(scratch, stage, from, alone, sets), single, /*save=*/true);
    world.barrier();
    if (stage != "PRETRAIN")
      for (size_t i = 0; i < meshes.size(); ++i) {
        const auto& [label, mesh] = meshes[i];
        const Degrees& d = mesh->layout().degrees();
        std::vector<std::string> own = sets;
        own.insert(own.end(), {"parallel.tensor=" + std::to_string(d.tensor), "parallel.context=" + std::to_string(d.context),
                               "parallel.expert=" + std::to_string(d.expert)});
        const std::string folder = scratch / (stage + std::to_string(i) + "/r" + std::to_string(world.rank()));
        const std::vector<Numbers> got = train(test::recipe(scratch, stage, from, folder, own), *mesh, /*save=*/false);
        if (!first) continue;
        for (size_t step = 0; step < expected.size(); ++step) {
          const Numbers &e = expected[step], &g = got[step], t = tolerance(e, shape, stage == "SPARSE", precision);
          const auto compare = [&](const char* what, double value, double reference, double allowed) {
            if (reference == 0 && value == 0) return;
            std::printf("%s %s %s step %zu %-14s %.9g, one device %.9g, apart %.2g of %.2g allowed\n", precision.c_str(),
                        stage.c_str(), label.c_str(), step + 1, what, value, reference, std::abs(value - reference), allowed);
            EXPECT_LE(std::abs(value - reference), allowed) << stage << " " << label << " " << what;
            EXPECT_GT(reference, 0) << what;
          };
          compare("loss", g.lm_loss, e.lm_loss, t.lm_loss);
          compare("mtp loss", g.mtp_loss, e.mtp_loss, t.mtp_loss);
          compare("kl", g.kl, e.kl, t.kl);
          compare("backbone norm", g.backbone_norm, e.backbone_norm, t.backbone_norm);
          compare("indexer norm", g.indexer_norm, e.indexer_norm, t.indexer_norm);
        }
      }
    from = alone;
  }
}

INSTANTIATE_TEST_SUITE_P(Meshes, DeviceMesh,
                         testing::Combine(testing::Values(On::HOST, On::GPU), testing::Values("FP64", "FP32", "BF16")),
                         [](const testing::TestParamInfo<std::tuple<On, std::string>>& info) {
                           return test::label_of(std::get<0>(info.param)) + std::get<1>(info.param);
                         });

}  // namespace
}  // namespace dsa
