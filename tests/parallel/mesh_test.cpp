#include "parallel/mesh.h"

#include <gtest/gtest.h>
#include <mpi.h>

#include <stdexcept>

#include "tests/parallel/tensors.h"

namespace dsa {
namespace {

int world_size() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

std::vector<Degrees> all_meshes(int world) {
  std::vector<Degrees> all;
  for (int d = 1; d <= world; ++d)
    for (int c = 1; c <= world; ++c)
      for (int t = 1; t <= world; ++t)
        for (int e = 1; e <= world; ++e)
          if (d * c * t == world && world % e == 0) all.push_back({d, c, t, e});
  return all;
}

TEST(Mesh, EveryAxisConnectsTheRanksOfItsGroup) {
  for (const Degrees& degrees : all_meshes(world_size())) {
    const Mesh mesh(degrees, /*check_calls=*/true);
    at::Tensor mine = at::empty({1}, at::TensorOptions(at::kLong));
    mine.fill_(mesh.rank());
    for (int a = 0; a < kAxisCount; ++a) {
      const Axis axis = static_cast<Axis>(a);
      Communicator& group = mesh.along(axis);
      const at::Tensor ranks = group.all_gather(mine);
      const std::vector<int> expected = mesh.layout().group(axis, mesh.rank());
      EXPECT_EQ(group.name(), name_of(axis));
      ASSERT_EQ(group.size(), static_cast<int>(expected.size()));
      EXPECT_EQ(expected[group.rank()], mesh.rank());
      for (int r = 0; r < group.size(); ++r) EXPECT_EQ(ranks.data_ptr<int64_t>()[r], expected[r]);
    }
  }
}

TEST(Mesh, LabelNamesTheCoordinates) {
  const int world = world_size();
  const Mesh mesh({.data = 1, .context = 1, .tensor = world, .expert = world});
  const std::string r = std::to_string(mesh.rank());
  EXPECT_EQ(mesh.label(), "[rank " + r + " tp=" + r + " cp=0 dp=0 ep=" + r + "]");
}

TEST(Mesh, RefusesAnotherWorldSize) {
  try {
    Mesh mesh({.data = world_size() + 1});
    FAIL() << "accepted";
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find("mpirun -np " + std::to_string(world_size() + 1)), std::string::npos);
  }
}

TEST(Mesh, SingleIsAloneWhateverMpiSays) {
  Mesh moved = Mesh::single();
  const Mesh mesh = std::move(moved);
  EXPECT_EQ(mesh.world_size(), 1);
  for (int a = 0; a < kAxisCount; ++a) EXPECT_EQ(mesh.along(static_cast<Axis>(a)).size(), 1);
  EXPECT_EQ(mesh.along(Axis::WORLD).all_reduce(test::filled({3}, at::kFloat, 1)).numel(), 3);
}

}  // namespace
}  // namespace dsa
