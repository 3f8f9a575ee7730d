// Weights from an HF folder, and from a checkpoint that refers to one.
#include "trainer/checkpoint/weight_source.h"

#include <fstream>

#include "data/error.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "warmed_model.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;
using test::kFp8;

std::string refusal(const std::string& path) {
  try {
    open_weights(path);
  } catch (const InputError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(Weights, HfFolderInSlicesAndBothWidths) {
  const auto source = open_weights(kFp8);
  const HfFolder folder(kFp8);
  EXPECT_EQ(source->digest(), folder.digest());
  for (const HfTensor& tensor : hf_tensors(folder.config(), HfFormat::V31)) {
    ASSERT_EQ(source->shape(tensor.name), tensor.shape);
    const bool matrix = tensor.shape.size() == 2;
    const int64_t rows = matrix ? tensor.shape[0] : 1, cols = tensor.shape.back();
    std::vector<float> all(rows * cols);
    folder.read_rows(tensor.name, 0, rows, 0, cols, all.data());
    // The lower right quarter, as one rank of a 2 x 2 layout would take it.
    const int64_t r0 = rows / 2, c0 = cols / 2;
    const ShardSpec box = matrix ? ShardSpec{tensor.name, tensor.shape, {r0, c0}, {rows - r0, cols - c0}}
                                 : ShardSpec{tensor.name, tensor.shape, {c0}, {cols - c0}};
    std::vector<float> f32(numel(box));
    std::vector<double> f64(numel(box));
    source->read(box, Dtype::F32, f32.data());
    source->read(box, Dtype::F64, f64.data());
    for (int64_t r = r0; r < rows; ++r)
      for (int64_t c = c0; c < cols; ++c) {
        const int64_t i = (r - r0) * (cols - c0) + c - c0;
        ASSERT_EQ(f32[i], all[r * cols + c]) << tensor.name;
        ASSERT_EQ(f64[i], static_cast<double>(all[r * cols + c])) << tensor.name;
      }
  }
  float x;
  EXPECT_THROW(source->read(whole("model.norm.weight", {7}), Dtype::F32, &x), InputError);
}

TEST(Weights, FrozenOnesComeFromTheBase) {
  test::TempFolder run("weights");
  const std::string path = test::save_warmed(run.path(), kFp8);
  EXPECT_LT(CheckpointReader(path).bytes(), 200000u);  // the indexer alone
  for (const std::string& form : {path, run.path()}) {
    const auto source = open_weights(form);
    EXPECT_EQ(source->path(), path);
    EXPECT_EQ(source->digest(), CheckpointReader(path).digest());
    EXPECT_EQ(source->hf_folder(), kFp8);
    const HfFolder folder(kFp8);
    for (const HfTensor& tensor : hf_tensors(source->config(), HfFormat::V32)) {
      ASSERT_TRUE(source->has(tensor.name)) << tensor.name;
      ASSERT_EQ(source->shape(tensor.name), tensor.shape);
      EXPECT_EQ(source->raw(tensor.name) != nullptr, !test::is_indexer(tensor.name)) << tensor.name;
      std::vector<float> got(numel(tensor.shape)), expected(got.size());
      source->read(whole(tensor.name, tensor.shape), Dtype::F32, got.data());
      const bool matrix = tensor.shape.size() == 2;
      if (test::is_indexer(tensor.name))
        expected = test::indexer_values(tensor);
      else
        folder.read_rows(tensor.name, 0, matrix ? tensor.shape[0] : 1, 0, tensor.shape.back(), expected.data());
      EXPECT_EQ(got, expected) << tensor.name;
    }
  }
}

TEST(Weights, AnotherOrAMissingBaseIsRefused) {
  test::TempFolder run("base");
  const std::string base = run / "base";
  fs::copy(kFp8, base);
  for (const auto& file : fs::directory_iterator(base)) fs::permissions(file, fs::perms::owner_write, fs::perm_options::add);
  test::save_warmed(run / "run", base);
  EXPECT_EQ(refusal(run / "run"), "accepted");
  std::ofstream(base + "/config.json", std::ios::app) << "\n";
  EXPECT_NE(refusal(run / "run").find("was trained on other weights than " + base), std::string::npos)
      << refusal(run / "run");
  fs::remove_all(base);
  EXPECT_NE(refusal(run / "run").find("that folder is gone"), std::string::npos) << refusal(run / "run");
}

TEST(Weights, ACheckpointOnACheckpoint) {
  test::TempFolder run("chain");
  const std::string first = test::save_warmed(run / "a", kFp8);
  // A second stage that trains model.norm alone, on top of the first.
  std::vector<float> norm(144, 3.0f);
  TrainingState state = CheckpointReader(first).state();
  state.base_path = first;
  state.base_digest = open_weights(first)->digest();
  LocalCommunicator world;
  const std::vector<StateShard> shards{{Role::PARAM, whole("model.norm.weight", {144}), Dtype::F32, norm.data()}};
  ASSERT_TRUE(save_checkpoint(run / "b", state, shards, world, 1).committed);
  const auto source = open_weights(run / "b");
  EXPECT_EQ(source->raw("model.norm.weight"), nullptr);
  EXPECT_NE(source->raw("lm_head.weight"), nullptr);
  EXPECT_TRUE(source->has("model.layers.0.self_attn.indexer.wk.weight"));
  std::vector<float> got(144);
  source->read(whole("model.norm.weight", {144}), Dtype::F32, got.data());
  EXPECT_EQ(got, norm);
}

TEST(Weights, OtherPathsAreRefused) {
  test::TempFolder run("other");
  EXPECT_NE(refusal(run.path()).find("it has no config.json"), std::string::npos);
  EXPECT_NE(refusal(run / "nothing").find("there is no such folder"), std::string::npos);
}

}  // namespace
}  // namespace dsa
