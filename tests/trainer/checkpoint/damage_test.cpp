// Damaged checkpoints are refused, each kind with its own words, and the older one is taken. Failed saves leave nothing.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <filesystem>
#include <functional>
#include <fstream>

#include "data/error.h"
#include "data/file.h"
#include "parallel/local_communicator.h"
#include "synthetic_state.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/checkpoint/run_folder.h"
#include "trainer/checkpoint/save.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;
using test::TempFolder;

std::string save(const std::string& run, int64_t step, int keep = 9) {
  LocalCommunicator world;
  const test::HeldState held = test::whole_state(test::synthetic_tensors(), step);
  const SaveResult saved = save_checkpoint(run, test::synthetic_facts(step), held.shards, world, keep);
  EXPECT_TRUE(saved.committed) << saved.error;
  return saved.path;
}

std::string refusal(const std::string& folder) {
  try {
    CheckpointReader(folder).verify();
  } catch (const InputError& e) {
    return e.what();
  }
  return "accepted";
}

void flip_bit(const std::string& path, uint64_t byte, int bit) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(byte));
  const char c = static_cast<char>(file.get() ^ (1 << bit));
  file.seekp(static_cast<std::streamoff>(byte));
  file.put(c);
}

class Damage : public testing::Test {
 protected:
  Damage() : run_("damage"), older_(save(run_.path(), 10)), newer_(save(run_.path(), 20)), shard_(newer_ + "/shard-r0000.h5") {}

  // The newer checkpoint is refused in these words, and the older one is the choice.
  void expect_refused(const std::string& words) {
    EXPECT_NE(refusal(newer_).find(words), std::string::npos) << refusal(newer_) << "\n  should say: " << words;
    std::vector<std::string> why;
    EXPECT_EQ(CheckpointReader::newest_valid(run_.path(), &why), older_);
    ASSERT_EQ(why.size(), 1u);
    EXPECT_EQ(why[0].rfind("step 20: ", 0), 0u) << why[0];
    EXPECT_NE(why[0].find(words), std::string::npos) << why[0];
    EXPECT_EQ(CheckpointReader(run_.path()).path(), older_);
  }

  TempFolder run_;
  std::string older_, newer_, shard_;
};

TEST_F(Damage, FlippedBitsAnywhere) {
  EXPECT_EQ(refusal(newer_), "accepted");
  for (const std::string& file : {shard_, newer_ + "/MANIFEST.json"}) {
    const uint64_t size = fs::file_size(file);
    std::mt19937 rng(1);
    for (int i = 0; i < 100; ++i) {
      const uint64_t byte = i == 0 ? 0 : rng() % (size - 1);  // the manifest's last byte is a newline
      flip_bit(file, byte, i % 7);
      EXPECT_NE(refusal(newer_), "accepted") << file << " byte " << byte;
      flip_bit(file, byte, i % 7);
    }
  }
  EXPECT_EQ(refusal(newer_), "accepted");
  flip_bit(shard_, fs::file_size(shard_) / 2, 3);
  expect_refused("shard-r0000.h5 is damaged (block 0 of 1");
}

TEST_F(Damage, Truncated) {
  fs::resize_file(shard_, fs::file_size(shard_) - 1);
  expect_refused("shard-r0000.h5 is truncated");
}

TEST_F(Damage, Appended) {
  std::ofstream(shard_, std::ios::app) << "x";
  expect_refused("shard-r0000.h5 has grown");
}

TEST_F(Damage, MissingShard) {
  fs::remove(shard_);
  expect_refused("shard-r0000.h5 is missing");
}

TEST_F(Damage, ShardOfAnotherCheckpoint) {
  fs::copy_file(older_ + "/shard-r0000.h5", shard_, fs::copy_options::overwrite_existing);
  expect_refused("is damaged");
}

TEST_F(Damage, MissingManifest) {
  fs::remove(newer_ + "/MANIFEST.json");
  expect_refused("MANIFEST.json");
}

TEST_F(Damage, TruncatedManifest) {
  fs::resize_file(newer_ + "/MANIFEST.json", fs::file_size(newer_ + "/MANIFEST.json") / 2);
  expect_refused("MANIFEST.json");
}

TEST_F(Damage, NothingLeft) {
  flip_bit(shard_, 5000, 1);
  fs::remove(older_ + "/MANIFEST.json");
  std::vector<std::string> why;
  EXPECT_EQ(CheckpointReader::newest_valid(run_.path(), &why), std::nullopt);
  EXPECT_EQ(why.size(), 2u);
  try {
    CheckpointReader reader(run_.path());
    FAIL();
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("step 20: "), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("step 10: "), std::string::npos) << e.what();
  }
}

TEST_F(Damage, AMissingStepIsAnErrorThatListsTheOthers) {
  EXPECT_NE(refusal(checkpoint_folder(run_.path(), 15)).find("steps 10, 20"), std::string::npos)
      << refusal(checkpoint_folder(run_.path(), 15));
  EXPECT_NE(refusal(run_ / "nowhere").find("there is no such folder"), std::string::npos);
}

TEST(DamagedBlock, OnlyWhatIsReadIsChecked) {
  TempFolder run("blocks");
  LocalCommunicator world;
  const test::TensorKind kind{"w", {5000, 4096}, Role::PARAM, Dtype::F32};  // 82 MB: two blocks of 64 MiB
  std::vector<char> zeros(size_t{5000} * 4096 * 4, 0);
  const std::vector<StateShard> shards{{Role::PARAM, whole("w", kind.shape), Dtype::F32, zeros.data()}};
  const SaveResult saved = save_checkpoint(run.path(), test::synthetic_facts(1), shards, world, 1);
  ASSERT_TRUE(saved.committed) << saved.error;
  flip_bit(saved.path + "/shard-r0000.h5", 70 << 20, 0);
  const CheckpointReader reader(saved.path);
  std::vector<float> row(4096, 1);
  reader.read({"w", kind.shape, {0, 0}, {1, 4096}}, Role::PARAM, Dtype::F32, row.data());
  EXPECT_EQ(row[4095], 0.0f);
  try {
    reader.read({"w", kind.shape, {4999, 0}, {1, 4096}}, Role::PARAM, Dtype::F32, row.data());
    FAIL();
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("block 1 of 2"), std::string::npos) << e.what();
  }
  EXPECT_NO_THROW(reader.verify(0, 2));  // block 0
  EXPECT_THROW(reader.verify(1, 2), InputError);
}

// Runs `work` in a child process whose files may not grow over `limit` bytes: a disk that is full half-way.
int with_file_limit(uint64_t limit, const std::function<int()>& work) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit r{limit, limit};
    ::setrlimit(RLIMIT_FSIZE, &r);
    ::_exit(work());
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(FailedSave, FullDiskLeavesThePreviousCheckpoint) {
  TempFolder run("full");
  const std::string first = save(run.path(), 1);
  const uint64_t size = fs::file_size(first + "/shard-r0000.h5");
  int failures = 0;
  for (uint64_t limit = 0; limit < size + 65536; limit += 3001) {
    const int outcome = with_file_limit(limit, [&] {
      LocalCommunicator world;
      const test::HeldState held = test::whole_state(test::synthetic_tensors(), 2);
      const SaveResult saved = save_checkpoint(run.path(), test::synthetic_facts(2), held.shards, world, 9);
      if (saved.committed) return 0;
      if (saved.error.empty()) return 3;
      std::vector<std::string> there;
      for (const auto& entry : fs::directory_iterator(run / "checkpoints")) there.push_back(entry.path().filename());
      for (const std::string& name : there)
        if (name != "step-00000001" && name != "LATEST") return 4;
      return 1;
    });
    ASSERT_TRUE(outcome == 0 || outcome == 1) << "limit " << limit << ": " << outcome;
    failures += outcome;
    if (outcome == 0) {  // a save that said it was committed is sound
      EXPECT_EQ(refusal(checkpoint_folder(run.path(), 2)), "accepted") << limit;
      fs::remove_all(checkpoint_folder(run.path(), 2));
    }
    EXPECT_EQ(CheckpointReader::newest_valid(run.path(), nullptr), first);
  }
  EXPECT_GT(failures, 5);
}

TEST(FailedSave, RunFolderThatCannotBe) {
  TempFolder run("unwritable");
  std::ofstream(run / "file") << "x";
  LocalCommunicator world;
  const test::HeldState held = test::whole_state(test::synthetic_tensors(), 1);
  const SaveResult saved = save_checkpoint(run / "file", test::synthetic_facts(1), held.shards, world, 1);
  EXPECT_FALSE(saved.committed);
  EXPECT_NE(saved.error.find("choose a writable run folder"), std::string::npos) << saved.error;
}

TEST(Retention, KeepsTheNewestAndReplacesTheSameStep) {
  TempFolder run("keep");
  for (int64_t step = 1; step <= 5; ++step) save(run.path(), step, 2);
  EXPECT_EQ(checkpoint_steps(run.path()), (std::vector<int64_t>{4, 5}));
  const std::string before = CheckpointReader(checkpoint_folder(run.path(), 5)).digest();
  LocalCommunicator world;
  TrainingState again = test::synthetic_facts(5);
  again.stage = "WARMUP";
  const test::HeldState held = test::whole_state(test::synthetic_tensors(), 77);
  EXPECT_TRUE(save_checkpoint(run.path(), again, held.shards, world, 2).committed);
  EXPECT_NE(CheckpointReader(run.path()).digest(), before);
  EXPECT_EQ(CheckpointReader(run.path()).state().stage, "WARMUP");
  // Going on from an older step keeps what is newer, and never removes what was just written.
  save(run.path(), 3, 1);
  EXPECT_EQ(checkpoint_steps(run.path()), (std::vector<int64_t>{3, 4, 5}));
  EXPECT_EQ(read_text_file(run / "checkpoints/LATEST", 100), "step-00000003\n");
}

}  // namespace
}  // namespace dsa
