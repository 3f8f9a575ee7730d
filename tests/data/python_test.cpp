// Against the Python packages safetensors, numpy and h5py, which tools/setup.sh puts in ~/.cache/dsatrain/tools.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "data/safetensors.h"
#include "data/token_source.h"
#include "tests/data/temp_folder.h"

namespace dsa {
namespace {

using namespace testing_support;

std::string python() {
  if (const char* deps = std::getenv("DSATRAIN_DEPS")) return std::string(deps) + "/tools/bin/python";
  const char* home = std::getenv("HOME");
  return std::string(home ? home : "") + "/.cache/dsatrain/tools/bin/python";
}

// Standard output and error, and the exit status.
std::pair<std::string, int> run(const std::string& command) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  std::string out;
  char buffer[4096];
  while (size_t n = fread(buffer, 1, sizeof buffer, pipe)) out.append(buffer, n);
  const int status = pclose(pipe);
  return {out, WEXITSTATUS(status)};
}

class Python : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(python())) GTEST_SKIP() << "Python tools are missing: run tools/setup.sh";
  }
  std::pair<std::string, int> script(const std::string& text) {
    put_file(dir_ / "script.py", text);
    return run(python() + " " + (dir_ / "script.py"));
  }
  std::pair<std::string, int> tokenize(const std::string& arguments) {
    return run("cd " + dir_.path() + " && " + python() + " " + DSA_SOURCE + "/tools/tokenize.py " + arguments);
  }
  TempFolder dir_;
};

TEST_F(Python, ReadsOurSafetensors) {
  SafetensorsWriter writer(dir_ / "ours.safetensors",
                           {{"b", Dtype::BF16, {2, 3}}, {"f", Dtype::F32, {2, 2}}, {"i", Dtype::I64, {}}, {"名", Dtype::U8, {0}}},
                           {{"key", "välue"}});
  const float f[4] = {1, 2, 3, -0.5f};
  const uint16_t b[6] = {0x3f80, 0, 0, 0, 0, 0x4000};
  const int64_t i = -3;
  writer.write("f", f);
  writer.write("b", b);
  writer.write("i", &i);
  writer.commit();
  const auto [out, status] = script(
      "import safetensors, numpy as np\n"
      "raw = dict(safetensors.deserialize(open('" + (dir_ / "ours.safetensors") + "', 'rb').read()))\n"
      "assert sorted(raw) == ['b', 'f', 'i', '名'], raw\n"
      "assert raw['b']['dtype'] == 'BF16' and raw['b']['shape'] == [2, 3], raw\n"
      "assert np.frombuffer(raw['b']['data'], '<u2').tolist() == [0x3f80, 0, 0, 0, 0, 0x4000]\n"
      "with safetensors.safe_open('" + (dir_ / "ours.safetensors") + "', 'np') as g:\n"
      "    assert g.metadata() == {'key': 'välue'}\n"
      "    assert g.get_tensor('f').tolist() == [[1, 2], [3, -0.5]]\n"
      "    assert g.get_tensor('i').item() == -3\n"
      "print('good')\n");
  EXPECT_EQ(status, 0) << out;
  EXPECT_EQ(out, "good\n");
}

TEST_F(Python, WeReadItsSafetensors) {
  const auto [out, status] = script(
      "import numpy as np\nfrom safetensors.numpy import save_file\n"
      "save_file({'x': np.arange(12, dtype=np.float64).reshape(3, 4), 'h': np.array([1.5, -2], np.float16),\n"
      "           'q': np.array(True)}, '" + (dir_ / "theirs.safetensors") + "', metadata={'a': 'b'})\n");
  ASSERT_EQ(status, 0) << out;
  const SafetensorsFile file(dir_ / "theirs.safetensors");
  double x[12];
  file.read(*file.find("x"), 0, sizeof x, x);
  EXPECT_EQ(x[11], 11.0);
  EXPECT_EQ(file.find("x")->shape, (std::vector<int64_t>{3, 4}));
  EXPECT_EQ(file.find("h")->dtype, Dtype::F16);
  EXPECT_EQ(file.find("q")->dtype, Dtype::BOOL);
  EXPECT_EQ(file.metadata().at("a"), "b");
}

// The header of our file is byte for byte the one that the package writes for the same tensors.
TEST_F(Python, LaysOutTensorsAsThePackageDoes) {
  const auto [out, status] = script(
      "import numpy as np\nfrom safetensors.numpy import save_file\n"
      "save_file({n: np.zeros(s, d) for n, d, s in [('z', 'u1', 3), ('b', 'f4', (2, 2)), ('a', 'f4', 1), ('m', 'i8', 2),\n"
      "           ('k', 'f2', 4), ('c', 'f8', 1), ('o', '?', 1), ('i', 'i4', 5)]}, '" + (dir_ / "theirs") + "')\n");
  ASSERT_EQ(status, 0) << out;
  SafetensorsWriter writer(dir_ / "ours", {{"z", Dtype::U8, {3}}, {"b", Dtype::F32, {2, 2}}, {"a", Dtype::F32, {1}}, {"m", Dtype::I64, {2}},
                                           {"k", Dtype::F16, {4}}, {"c", Dtype::F64, {1}}, {"o", Dtype::BOOL, {1}}, {"i", Dtype::I32, {5}}});
  const std::string zeros(100, '\0');
  for (const char* name : {"z", "b", "a", "m", "k", "c", "o", "i"}) writer.write(name, zeros.data());
  writer.commit();
  EXPECT_EQ(get_file(dir_ / "ours"), get_file(dir_ / "theirs"));
}

TEST_F(Python, TokenizesBytes) {
  put_file(dir_ / "a.txt", "hello\fworld");
  ASSERT_EQ(run("cd " + dir_.path() + " && printf third | gzip > b.gz").second, 0);
  auto [out, status] = tokenize("--tokenizer byte --out t.h5 a.txt b.gz");
  ASSERT_EQ(status, 0) << out;
  expect_contains(out, "21 tokens in 3 documents");
  const auto source = open_token_source(dir_ / "t.h5", 258, true);
  EXPECT_EQ(source->document_starts(0, 100), (std::vector<int64_t>{0, 7, 14}));
  std::vector<int32_t> ids(21);
  source->read(0, 21, ids.data());
  std::string text;
  for (int32_t id : ids) text += id == 256 ? '<' : id == 257 ? '>' : static_cast<char>(id);
  EXPECT_EQ(text, "<hello><world><third>");
  EXPECT_EQ(source->tokenizer_sha256().size(), 64u);
  EXPECT_EQ(source->source(), "a.txt, b.gz");

  std::tie(out, status) = tokenize("--tokenizer byte --document-per-file --out u.h5 a.txt b.gz");
  EXPECT_EQ(open_token_source(dir_ / "u.h5", 258, true)->documents(), 2) << out;
}

TEST_F(Python, TokenizesWithATokenizerJson) {
  auto [out, status] = script(
      "from tokenizers import Tokenizer, models, pre_tokenizers\n"
      "t = Tokenizer(models.WordLevel({'<s>': 0, '</s>': 1, '?': 2, 'a': 3, 'b': 4}, unk_token='?'))\n"
      "t.pre_tokenizer = pre_tokenizers.Whitespace()\n"
      "t.save('" + (dir_ / "tokenizer.json") + "')\n");
  ASSERT_EQ(status, 0) << out;
  put_file(dir_ / "a.txt", "b a c");
  std::tie(out, status) = tokenize("--tokenizer tokenizer.json --out t.h5 a.txt");
  ASSERT_EQ(status, 0) << out;
  const auto source = open_token_source(dir_ / "t.h5", 5, true);
  std::vector<int32_t> ids(5);
  ASSERT_EQ(source->size(), 5);
  source->read(0, 5, ids.data());
  EXPECT_EQ(ids, (std::vector<int32_t>{0, 4, 3, 2, 1}));
  put_file(dir_ / "latin1.txt", "\xe9t\xe9");
  std::tie(out, status) = tokenize("--tokenizer tokenizer.json --out v.h5 latin1.txt");
  EXPECT_EQ(status, 3);
  expect_contains(out, "not UTF-8");
}

TEST_F(Python, TokenizeRefusesAndLeavesNothing) {
  put_file(dir_ / "a.txt", "text");
  put_file(dir_ / "t.h5", "mine");
  put_file(dir_ / "blank.txt", " \n ");
  const size_t before = dir_.entries();
  for (const auto& [arguments, part] : {std::pair<std::string, std::string>{"--tokenizer byte --out t.h5 a.txt", "exists already"},
                                        {"--tokenizer byte --out u.h5 a.txt none.txt", "cannot read none.txt"},
                                        {"--tokenizer byte --out u.h5 blank.txt", "holds no text"},
                                        {"--tokenizer a.txt --out u.h5 a.txt", "give a HuggingFace tokenizer.json"},
                                        {"--tokenizer byte --out no/u.h5 a.txt", "cannot write no/u.h5"}}) {
    const auto [out, status] = tokenize(arguments);
    EXPECT_EQ(status, 3) << out;
    expect_contains(out, part);
    EXPECT_EQ(out.find("Traceback"), std::string::npos) << out;
  }
  EXPECT_EQ(dir_.entries(), before);
}

}  // namespace
}  // namespace dsa
