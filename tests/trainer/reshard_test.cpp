// A checkpoint saved on any mesh loads on any other, bit for bit: the whole state (master weights, both moments, router
// bias) read back from the target mesh's own optimizer equals the state that was saved. Four ranks, all legal meshes.
#include <gtest/gtest.h>
#include <mpi.h>

#include <cstring>
#include <filesystem>

#include "tests/support/dsa_guard.h"
#include "tests/trainer/tiny_run.h"
#include "trainer/trainer.h"

namespace dsa {
namespace {

std::vector<Degrees> legal_meshes(int world) {
  std::vector<Degrees> meshes;
  for (int tensor = 1; tensor <= world; tensor *= 2)
    for (int context = 1; tensor * context <= world; context *= 2)
      for (int expert = 1; expert <= world; expert *= 2)
        meshes.push_back({world / (tensor * context), context, tensor, expert});
  return meshes;
}

std::vector<std::string> sets(const Degrees& d) {
  return {"parallel.tensor=" + std::to_string(d.tensor), "parallel.context=" + std::to_string(d.context),
          "parallel.expert=" + std::to_string(d.expert), "checkpoint.keep=100"};
}

// Counts the boxes of this rank whose memory differs from the checkpoint's.
int64_t differing_boxes(const Trainer& trainer, const CheckpointReader& saved) {
  int64_t differ = 0;
  for (const StateShard& s : trainer.optimizer().state().shards) {
    std::vector<double> stored(static_cast<size_t>(numel(s.box)));
    saved.read(s.box, s.role, Dtype::F64, stored.data());
    differ += std::memcmp(stored.data(), s.data, stored.size() * sizeof(double)) != 0;
  }
  return differ;
}

TEST(Reshard, AnyMeshToAnyOther) {
  DSA_GUARD(test::kSequence, test::kTopK);
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const Mesh everyone(Degrees{size, 1, 1, 1});
  Communicator& world = everyone.along(Axis::WORLD);
  test::Scratch scratch(world);
  if (world.rank() == 0) test::write_inputs(scratch);
  world.barrier();
  const std::string recipe_folder = scratch / ("recipes-r" + std::to_string(world.rank()));
  const auto recipe = [&](const Degrees& d, const std::string& folder) {
    std::vector<std::string> all = sets(d);
    all.push_back("run.folder=" + folder);
    return test::recipe(scratch, "PRETRAIN", "", recipe_folder + "/run", all);
  };
  const std::vector<Degrees> meshes = legal_meshes(size);
  int pairs = 0;
  for (size_t from = 0; from < meshes.size(); ++from) {
    const std::string folder = scratch / ("from" + std::to_string(from));
    {
      Mesh mesh(meshes[from]);
      Trainer trainer(recipe(meshes[from], folder), mesh);
      trainer.step(1);
      trainer.save(1);
    }
    const CheckpointReader saved(folder);
    for (size_t hop = 1; hop <= 3; ++hop) {
      const Degrees& d = meshes[(from + hop * hop) % meshes.size()];
      Mesh mesh(d);
      const Trainer trainer(recipe(d, folder), mesh);
      EXPECT_EQ(trainer.steps_done(), 1);
      EXPECT_EQ(differing_boxes(trainer, saved), 0) << "from mesh " << from << ", hop " << hop;
      ++pairs;
    }
  }
  EXPECT_GE(pairs, size == 4 ? 30 : 1);
}

// Bit-equal resume in one process: 4 steps straight = 2 + resume + 2, all stages.
TEST(Resume, IsBitEqual) {
  DSA_GUARD(test::kSequence, test::kTopK);
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  Mesh mesh(Degrees{size, 1, 1, 1});
  Communicator& world = mesh.along(Axis::WORLD);
  test::Scratch scratch(world);
  if (world.rank() == 0) test::write_inputs(scratch);
  world.barrier();
  std::string from;
  for (const std::string stage : {"PRETRAIN", "WARMUP", "SPARSE"}) {
    const auto recipe = [&](const std::string& folder) {
      return test::recipe(scratch, stage, from, scratch / ("r" + std::to_string(world.rank()) + "/run"),
                          {"schedule.steps=4", "compute.precision=FP32", "run.folder=" + folder});
    };
    const std::string straight = scratch / (stage + "-straight"), broken = scratch / (stage + "-broken");
    std::vector<double> losses[2];
    const auto run = [&](const std::string& folder, int64_t first, int64_t last, std::vector<double>& out) {
      Trainer trainer(recipe(folder), mesh);
      EXPECT_EQ(trainer.steps_done(), first - 1);
      for (int64_t n = first; n <= last; ++n) {
        const StepReport r = trainer.step(n);
        out.insert(out.end(), {*r.lm_loss, r.kl_mean.value_or(0), r.grad_norm_backbone.value_or(0)});
      }
      trainer.save(last);
    };
    run(straight, 1, 4, losses[0]);
    run(broken, 1, 2, losses[1]);
    run(broken, 3, 4, losses[1]);
    EXPECT_EQ(losses[0], losses[1]) << stage;
    const CheckpointReader a(straight), b(broken);
    for (const Role role : {Role::PARAM, Role::MOMENT1, Role::MOMENT2, Role::BUFFER}) {
      ASSERT_EQ(a.names(role), b.names(role));
      for (const std::string& name : a.names(role)) {
        const ShardSpec box = whole(name, a.shape(name, role));
        std::vector<float> x(static_cast<size_t>(numel(box))), y(x.size());
        a.read(box, role, Dtype::F32, x.data());
        b.read(box, role, Dtype::F32, y.data());
        EXPECT_EQ(std::memcmp(x.data(), y.data(), x.size() * sizeof(float)), 0) << stage << " " << name;
      }
    }
    from = straight;
  }
}

}  // namespace
}  // namespace dsa
