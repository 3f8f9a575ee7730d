// inspect: every kind of path, sound and not.
#include "trainer/checkpoint/inspect.h"

#include <fstream>

#include "data/error.h"
#include "data/hdf5_file.h"
#include "warmed_model.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;

void expect_says(const Inspection& inspection, const std::vector<std::string>& all) {
  for (const std::string& words : all)
    EXPECT_NE(inspection.text.find(words), std::string::npos) << words << " is not in\n" << inspection.text;
}

TEST(Inspect, HfFolder) {
  const Inspection i = inspect(test::kFp8);
  EXPECT_TRUE(i.healthy);
  expect_says(i, {"HF model folder, V3.1", "2 layers + 1 MTP", "145 tensors", "F8_E4M3", "3 shards"});
}

TEST(Inspect, CheckpointAndRunFolder) {
  test::TempFolder run("inspect");
  const std::string path = test::save_warmed(run.path(), test::kFp8);
  Inspection i = inspect(path);
  EXPECT_TRUE(i.healthy) << i.text;
  expect_says(i, {"dsatrain checkpoint", "5 of stage WARMUP", "indexer 4 x 16 top-16", "PARAM", "15 tensors",
                  "every byte has the hash", test::kFp8});
  i = inspect(run.path());
  EXPECT_TRUE(i.healthy) << i.text;
  expect_says(i, {"run folder", "steps 5", "step 5 is sound", "resumes at   " + path});

  fs::create_directory(run / "checkpoints/step-00000006.tmp-1-2");
  std::ofstream(path + "/shard-r0000.h5", std::ios::app) << "x";
  i = inspect(run.path());
  EXPECT_FALSE(i.healthy);
  expect_says(i, {"PROBLEM", "has grown", "leftover     step-00000006.tmp-1-2"});
  EXPECT_THROW(inspect(path), InputError);
}

TEST(Inspect, Tokens) {
  test::TempFolder folder("inspect-tokens");
  {
    Hdf5File file = Hdf5File::create(folder / "t.h5");
    const std::vector<uint32_t> tokens{256, 1, 2, 257, 256, 3, 257};
    const std::vector<int64_t> offsets{0, 4, 7};
    file.write_dataset("tokens", Dtype::U32, {7}, tokens.data());
    file.write_dataset("document_offsets", Dtype::I64, {3}, offsets.data());
    for (const auto& [key, value] : std::map<std::string, std::string>{
             {"format", "dsatrain.tokens"}, {"tokenizer_sha256", "byte"}, {"source", "a test"}})
      file.set_attribute(key, value);
    for (const auto& [key, value] :
         std::map<std::string, int64_t>{{"version", 1}, {"vocab_size", 258}, {"bos_id", 256}, {"eos_id", 257}})
      file.set_attribute(key, value);
    file.close();
  }
  const Inspection i = inspect(folder / "t.h5");
  EXPECT_TRUE(i.healthy);
  expect_says(i, {"token file", "tokens       7", "documents    2", "258, BOS 256, EOS 257", "a test"});
  const Inspection m = inspect(std::string(DSA_GOLDEN) + "/megatron_index/small_uint16");
  expect_says(m, {"Megatron"});
}

TEST(Inspect, NothingKnown) {
  test::TempFolder folder("inspect-nothing");
  EXPECT_THROW(inspect(folder.path()), InputError);
  EXPECT_THROW(inspect(folder / "none"), InputError);
}

}  // namespace
}  // namespace dsa
