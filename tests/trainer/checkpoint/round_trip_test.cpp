// Any layout saved, any other loaded, bit for bit; under mpirun the boxes really lie on different ranks.
#include <gtest/gtest.h>
#include <mpi.h>

#include <filesystem>
#include <set>

#include "data/error.h"
#include "data/file.h"
#include "data/hdf5_file.h"
#include "parallel/local_communicator.h"
#include "parallel/mpi_communicator.h"
#include "synthetic_state.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/manifest.h"
#include "trainer/checkpoint/run_folder.h"
#include "trainer/checkpoint/save.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;
using test::HeldState;
using test::TempFolder;
using test::TensorKind;

std::unique_ptr<Communicator> world() {
  MPI_Comm copy;
  MPI_Comm_dup(MPI_COMM_WORLD, &copy);
  return std::make_unique<MpiCommunicator>(copy, "world");
}

// One folder for all ranks.
struct SharedFolder {
  explicit SharedFolder(Communicator& world) {
    if (world.rank() == 0) mine.emplace("round-trip");
    path = world.all_gather_text(mine ? mine->path() : "")[0];
  }
  std::optional<TempFolder> mine;
  std::string path;
};

// The boxes of a random layout that fall to this rank; some boxes have copies on other ranks.
HeldState random_layout(const std::vector<TensorKind>& kinds, bool rows_only, int rank, int ranks, uint64_t salt,
                        std::mt19937& rng) {
  HeldState held;
  for (const TensorKind& kind : kinds)
    for (const Box& box : test::random_boxes(kind.shape, 1 + static_cast<int>(rng() % 9), rows_only, rng)) {
      const int first = static_cast<int>(rng() % ranks), copies = 1 + static_cast<int>(rng() % ranks);
      for (int c = 0; c < copies; ++c)
        if ((first + c) % ranks == rank) held.add(kind, box, salt);
    }
  return held;
}

TEST(RoundTrip, AnyLayoutIntoAnyOther) {
  const auto comm = world();
  SharedFolder run(*comm);
  const std::vector<TensorKind> kinds = test::synthetic_tensors();
  std::mt19937 rng(11);  // the same on all ranks
  for (int pair = 0; pair < 40; ++pair) {
    const HeldState held = random_layout(kinds, pair % 2, comm->rank(), comm->size(), pair, rng);
    const SaveResult saved = save_checkpoint(run.path, test::synthetic_facts(pair + 1), held.shards, *comm, 2);
    EXPECT_TRUE(saved.committed) << saved.error;
    EXPECT_EQ(saved.error, "");
    EXPECT_EQ(saved.path, checkpoint_folder(run.path, pair + 1));
    const CheckpointReader reader(saved.path);
    EXPECT_TRUE(reader.state() == test::synthetic_facts(pair + 1));
    EXPECT_EQ(reader.bytes(), saved.bytes);
    for (const TensorKind& kind : kinds) {
      EXPECT_EQ(reader.shape(kind.name, kind.role), kind.shape);
      for (const Box& box : test::random_boxes(kind.shape, 1 + static_cast<int>(rng() % 9), false, rng)) {
        const std::vector<char> expected = test::make_box(kind, box, pair);
        std::vector<char> got(expected.size(), 0x55);
        reader.read({kind.name, kind.shape, box.offset, box.extent}, kind.role, kind.dtype, got.data());
        EXPECT_EQ(got, expected) << kind.name;
      }
    }
    comm->barrier();  // nobody saves (and removes old steps) while another rank still reads
  }
  if (comm->rank() == 0) {
    EXPECT_EQ(checkpoint_steps(run.path), (std::vector<int64_t>{39, 40}));
    std::set<std::string> there;
    for (const auto& entry : fs::directory_iterator(run.path + "/checkpoints")) there.insert(entry.path().filename());
    EXPECT_EQ(there, (std::set<std::string>{"LATEST", "step-00000039", "step-00000040"}));
  }
  std::vector<std::string> why;
  EXPECT_EQ(CheckpointReader::newest_valid(run.path, *comm, &why), checkpoint_folder(run.path, 40));
  EXPECT_TRUE(why.empty());
  comm->barrier();
}

TEST(RoundTrip, CopiesAreWrittenOnce) {
  const auto comm = world();
  SharedFolder run(*comm);
  const TensorKind kind{"w", {4096, 256}, Role::PARAM, Dtype::F32};
  const HeldState held = test::whole_state({kind}, 3);  // on every rank
  const SaveResult saved = save_checkpoint(run.path, test::synthetic_facts(1), held.shards, *comm, 1);
  ASSERT_TRUE(saved.committed) << saved.error;
  EXPECT_LT(saved.bytes, 4096 * 256 * 4 + 65536u);
  CheckpointReader(saved.path).verify();
  comm->barrier();
}

TEST(RoundTrip, TheFilesAreOrdinaryHdf5) {
  const auto comm = world();
  SharedFolder run(*comm);
  const std::vector<TensorKind> kinds = test::synthetic_tensors();
  std::mt19937 rng(3);
  const HeldState held = random_layout(kinds, false, comm->rank(), comm->size(), 9, rng);
  const SaveResult saved = save_checkpoint(run.path, test::synthetic_facts(1), held.shards, *comm, 1);
  EXPECT_TRUE(saved.committed) << saved.error;
  if (comm->rank() == 0) {
    const Manifest manifest = Manifest::from_text(read_text_file(saved.path + "/MANIFEST.json", 1 << 30), "manifest");
    int compared = 0;
    for (const TensorKind& kind : kinds)
      for (const StoredBox& stored : manifest.entries.at(kind.role).at(kind.name).boxes) {
        const Hdf5File file = Hdf5File::open(saved.path + "/" + manifest.files[stored.file].name);
        const std::string dataset = dataset_name(kind.role, kind.name, stored.box.offset);
        EXPECT_EQ(file.shape(dataset), stored.box.extent);
        EXPECT_EQ(file.dtype(dataset), kind.dtype);
        const std::vector<char> expected = test::make_box(kind, stored.box, 9);
        std::vector<char> got(expected.size());
        file.read_dataset(dataset, got.data());
        EXPECT_EQ(got, expected) << dataset;
        ++compared;
      }
    EXPECT_GE(compared, 13);
  }
  comm->barrier();
}

TEST(RoundTrip, ReadingConvertsBetweenFloatTypes) {
  LocalCommunicator comm;
  TempFolder run("convert-" + std::to_string(world()->rank()));
  float f32[] = {1.5f, -0.1f, 3e38f};
  double f64[] = {0.1, -1e300, 2.0};
  uint16_t bf16[] = {0x3fc0, 0xbf80, 0x0001};
  const std::vector<StateShard> shards{{Role::PARAM, whole("a", {3}), Dtype::F32, f32},
                                       {Role::PARAM, whole("b", {3}), Dtype::F64, f64},
                                       {Role::PARAM, whole("c", {3}), Dtype::BF16, bf16}};
  const SaveResult saved = save_checkpoint(run.path(), test::synthetic_facts(1), shards, comm, 1);
  ASSERT_TRUE(saved.committed) << saved.error;
  const CheckpointReader reader(saved.path);
  double as_double[3];
  float as_float[3];
  reader.read(whole("a", {3}), Role::PARAM, Dtype::F64, as_double);
  EXPECT_EQ(as_double[1], static_cast<double>(-0.1f));
  reader.read(whole("b", {3}), Role::PARAM, Dtype::F32, as_float);
  EXPECT_EQ(as_float[0], 0.1f);
  EXPECT_EQ(as_float[1], -HUGE_VALF);
  reader.read(whole("c", {3}), Role::PARAM, Dtype::F32, as_float);
  EXPECT_EQ(as_float[0], 1.5f);
  EXPECT_EQ(as_float[1], -1.0f);
  EXPECT_THROW(reader.read(whole("a", {3}), Role::PARAM, Dtype::BF16, as_float), InputError);
  EXPECT_THROW(reader.read(whole("a", {4}), Role::PARAM, Dtype::F32, as_float), InputError);
  EXPECT_THROW(reader.read(whole("z", {3}), Role::PARAM, Dtype::F32, as_float), InputError);
}

TEST(RoundTrip, SwappedShardsAreRefusedAndNamed) {
  const auto comm = world();
  if (comm->size() == 1) GTEST_SKIP() << "needs two ranks";
  SharedFolder run(*comm);
  const TensorKind kind{"w", {4 * comm->size(), 16}, Role::PARAM, Dtype::F32};
  HeldState held;
  held.add(kind, {{4 * comm->rank(), 0}, {4, 16}}, 1);
  const SaveResult saved = save_checkpoint(run.path, test::synthetic_facts(1), held.shards, *comm, 1);
  EXPECT_TRUE(saved.committed) << saved.error;
  if (comm->rank() == 0) {
    fs::rename(saved.path + "/shard-r0000.h5", saved.path + "/x");
    fs::rename(saved.path + "/shard-r0001.h5", saved.path + "/shard-r0000.h5");
    fs::rename(saved.path + "/x", saved.path + "/shard-r0001.h5");
  }
  comm->barrier();
  std::vector<std::string> why;
  EXPECT_EQ(CheckpointReader::newest_valid(run.path, *comm, &why), std::nullopt);
  EXPECT_EQ(why.size(), 1u);
  const std::string reason = why.empty() ? "" : why[0];
  EXPECT_NE(reason.find("shard-r0000.h5 is damaged (it holds the bytes of shard-r0001.h5"), std::string::npos) << reason;
  comm->barrier();
}

TEST(RoundTrip, AFailureOnOneRankFailsAllAndLeavesNothing) {
  const auto comm = world();
  SharedFolder run(*comm);
  const TensorKind kind{"w", {8, 4}, Role::PARAM, Dtype::F32};
  HeldState held = test::whole_state({kind}, 1);
  EXPECT_TRUE(save_checkpoint(run.path, test::synthetic_facts(1), held.shards, *comm, 2).committed);
  const int last = comm->size() - 1;
  if (comm->rank() == last) held.shards[0].data = nullptr;
  const SaveResult failed = save_checkpoint(run.path, test::synthetic_facts(2), held.shards, *comm, 2);
  EXPECT_FALSE(failed.committed);
  EXPECT_NE(failed.error.find("no data"), std::string::npos) << failed.error;
  const std::string culprit = comm->size() > 1 ? "rank " + std::to_string(last) + ":" : "";
  EXPECT_EQ(failed.error.rfind(culprit, 0), 0u) << failed.error;
  EXPECT_EQ(checkpoint_steps(run.path), std::vector<int64_t>{1});
  EXPECT_EQ(CheckpointReader::newest_valid(run.path, *comm, nullptr), checkpoint_folder(run.path, 1));
  comm->barrier();
}

}  // namespace
}  // namespace dsa
