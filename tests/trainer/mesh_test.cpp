// Results do not depend on the mesh: three fp64 steps of every stage on each mesh of this world size give the losses,
// gradient norms and parameters of one rank, to 1e-10 relative. The model has MTP, groups, balance loss and bias
// updates; sequence 64 > top-k 16.
#include <gtest/gtest.h>
#include <mpi.h>

#include <map>

#include "tests/support/dsa_guard.h"
#include "tests/support/tensors.h"
#include "tests/trainer/tiny_run.h"
#include "trainer/trainer.h"

namespace dsa {
namespace {

struct Outcome {
  std::vector<double> numbers;  // per step: losses, KL, recall, norms
  std::map<std::string, at::Tensor> parameters;
};

Outcome train(const ResolvedRecipe& recipe, Mesh& mesh, bool save = false) {
  Trainer trainer(recipe, mesh);
  Outcome out;
  for (int64_t n = 1; n <= recipe.recipe.schedule.steps; ++n) {
    const StepReport r = trainer.step(n);
    for (const auto& x : {r.lm_loss, r.mtp_loss, r.kl_mean, r.grad_norm_backbone, r.grad_norm_indexer})
      out.numbers.push_back(x.value_or(0));
    out.numbers.push_back(mean(r.recall_layer));
  }
  out.numbers.push_back(trainer.held_out_loss());
  for (const Parameter& p : trainer.model().parameters().parameters)
    for (const auto& [name, value] : gather_whole(p, p.value, mesh)) out.parameters[name] = value;
  for (const Buffer& b : trainer.model().parameters().buffers) out.parameters[b.name] = b.value.clone();
  if (save) trainer.save(recipe.recipe.schedule.steps);
  return out;
}

std::vector<Degrees> meshes(int world) {
  if (world == 2) return {{2, 1, 1, 1}, {2, 1, 1, 2}, {1, 1, 2, 1}, {1, 1, 2, 2}, {1, 2, 1, 1}, {1, 2, 1, 2}};
  if (world == 4)
    return {{1, 1, 4, 1}, {4, 1, 1, 4}, {1, 2, 2, 2}, {2, 1, 2, 2}, {1, 4, 1, 4}, {2, 2, 1, 1}};
  return {{1, 1, 1, 1}};
}

TEST(Mesh, EveryMeshTrainsAlike) {
  DSA_GUARD(test::kSequence, test::kTopK);
  const Mesh mpi_world([] {
    int size = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    return Degrees{size, 1, 1, 1};
  }());
  Communicator& world = mpi_world.along(Axis::WORLD);
  const bool first = world.rank() == 0;
  test::Scratch scratch(world);
  Mesh single = Mesh::single();
  std::string from;
  if (first) test::write_inputs(scratch);
  world.barrier();
  for (const std::string stage : {"PRETRAIN", "WARMUP", "SPARSE"}) {
    Outcome expected;
    const std::string alone = scratch / (stage + "-single");
    if (first) expected = train(test::recipe(scratch, stage, from, alone), single, /*save=*/true);
    world.barrier();
    int number = 0;
    for (const Degrees& d : meshes(world.size())) {
      const std::string label = stage + " data " + std::to_string(d.data) + " context " + std::to_string(d.context) +
                                " tensor " + std::to_string(d.tensor) + " expert " + std::to_string(d.expert);
      const std::string folder = scratch / (stage + "-" + std::to_string(number++) + "/r" + std::to_string(world.rank()));
      std::vector<std::string> sets{"parallel.tensor=" + std::to_string(d.tensor),
                                    "parallel.context=" + std::to_string(d.context),
                                    "parallel.expert=" + std::to_string(d.expert)};
      ResolvedRecipe recipe = test::recipe(scratch, stage, from, folder, sets);
      Mesh mesh(d);
      const Outcome got = train(recipe, mesh);
      if (!first) continue;
      ASSERT_EQ(got.numbers.size(), expected.numbers.size());
      for (size_t i = 0; i < got.numbers.size(); ++i)
        EXPECT_NEAR(got.numbers[i], expected.numbers[i], 1e-10 * std::abs(expected.numbers[i])) << label << ", number " << i;
      ASSERT_EQ(got.parameters.size(), expected.parameters.size());
      for (const auto& [name, value] : expected.parameters)
        EXPECT_LT(relative_distance(got.parameters.at(name), value), 1e-10) << label << ", " << name;
    }
    from = alone;
  }
}

// One rank: any split into microbatches, and recomputation, give the same three steps.
TEST(Mesh, MicrobatchesAndRecomputationChangeNothing) {
  DSA_GUARD(test::kSequence, test::kTopK);
  const Mesh mpi_world([] {
    int size = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    return Degrees{size, 1, 1, 1};
  }());
  Communicator& world = mpi_world.along(Axis::WORLD);
  test::Scratch scratch(world);
  if (world.rank() == 0) {
    test::write_inputs(scratch);
    Mesh single = Mesh::single();
    std::string from;
    for (const std::string stage : {"PRETRAIN", "WARMUP", "SPARSE"}) {
      const std::string alone = scratch / (stage + "-single");
      const Outcome expected = train(test::recipe(scratch, stage, from, alone), single, /*save=*/true);
      for (const std::vector<std::string>& sets : {std::vector<std::string>{"batch.micro_sequences=2"},
                                                  {"batch.micro_sequences=4", "compute.recompute=NONE"}}) {
        const Outcome got = train(test::recipe(scratch, stage, from, scratch / (stage + sets[0]), sets), single);
        for (size_t i = 0; i < got.numbers.size(); ++i)
          EXPECT_NEAR(got.numbers[i], expected.numbers[i], 1e-10 * std::abs(expected.numbers[i])) << stage << i;
        for (const auto& [name, value] : expected.parameters)
          EXPECT_LT(relative_distance(got.parameters.at(name), value), 1e-10) << stage << " " << sets[0] << " " << name;
      }
      from = alone;
    }
  }
  world.barrier();
}

}  // namespace
}  // namespace dsa
