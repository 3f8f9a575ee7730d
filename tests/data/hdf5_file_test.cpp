#include "data/hdf5_file.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <numeric>
#include <thread>

#include "data/file.h"
#include "tests/data/temp_folder.h"

namespace dsa {
namespace {

using namespace testing_support;

TEST(Hdf5File, DatasetsAndAttributesComeBack) {
  TempFolder dir;
  std::vector<float> values(6 * 5 * 4);
  std::iota(values.begin(), values.end(), 0.0f);
  const std::vector<uint16_t> bf16{1, 2, 65535};
  const double scalar = 0.1;
  {
    auto file = Hdf5File::create(dir / "a.h5");
    file.write_dataset("param/model.layers.0.weight", Dtype::F32, {6, 5, 4}, values.data());
    file.write_dataset("bf16", Dtype::BF16, {3}, bf16.data());
    file.write_dataset("scalar", Dtype::F64, {}, &scalar);
    file.write_dataset("nothing", Dtype::U8, {0, 3}, nullptr);
    file.create_dataset("m/pieces", Dtype::I64, {3, 2});
    const int64_t piece[2] = {7, 8};
    for (int64_t r = 0; r < 3; ++r) file.write_slab("m/pieces", {r, 0}, {1, 2}, piece);
    file.set_attribute("text", std::string("ü €"));
    file.set_attribute("text", std::string("replaced"));
    file.set_attribute("empty", std::string());
    file.set_attribute("number", int64_t{1} << 40);
    file.set_attribute("on", std::string("group"), "param");
    expect_contains(refusal([&] { Hdf5File::create(dir / "a.h5"); }), "exists already");
    file.close();
  }
  const auto file = Hdf5File::open(dir / "a.h5");
  EXPECT_EQ(file.names(), (std::vector<std::string>{"bf16", "m/pieces", "nothing", "param/model.layers.0.weight", "scalar"}));
  EXPECT_EQ(file.shape("param/model.layers.0.weight"), (std::vector<int64_t>{6, 5, 4}));
  EXPECT_EQ(file.dtype("bf16"), Dtype::BF16);
  EXPECT_EQ(file.dtype("param/model.layers.0.weight"), Dtype::F32);
  std::vector<uint16_t> back(3);
  file.read_dataset("bf16", back.data());
  EXPECT_EQ(back, bf16);
  double d = 0;
  file.read_dataset("scalar", &d);
  EXPECT_EQ(d, scalar);
  file.read_dataset("nothing", nullptr);
  std::vector<float> slab(2 * 3 * 1);
  file.read_dataset("param/model.layers.0.weight", {4, 1, 3}, {2, 3, 1}, slab.data());
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t j = 0; j < 3; ++j) EXPECT_EQ(slab[static_cast<size_t>(i * 3 + j)], static_cast<float>((4 + i) * 20 + (1 + j) * 4 + 3));
  std::vector<int64_t> pieces(6);
  file.read_dataset("m/pieces", pieces.data());
  EXPECT_EQ(pieces, (std::vector<int64_t>{7, 8, 7, 8, 7, 8}));
  EXPECT_EQ(file.string_attribute("text"), "replaced");
  EXPECT_EQ(file.string_attribute("empty"), "");
  EXPECT_EQ(file.string_attribute("on", "param"), "group");
  EXPECT_EQ(file.int_attribute("number"), int64_t{1} << 40);
  EXPECT_FALSE(file.int_attribute("absent"));
  EXPECT_TRUE(file.has("m/pieces") && file.has("param"));
  EXPECT_FALSE(file.has("m/none") || file.has("none/none/none"));

  expect_contains(refusal([&] { file.int_attribute("text"); }), "not an integer");
  expect_contains(refusal([&] { file.read_dataset("none", &d); }), "cannot open dataset none");
  EXPECT_THROW(file.read_dataset("bf16", {2}, {2}, back.data()), std::out_of_range);
  EXPECT_THROW(file.read_dataset("bf16", {0, 0}, {1, 1}, back.data()), std::invalid_argument);
}

// Also when a second has passed: HDF5 keeps times unless told otherwise.
TEST(Hdf5File, EqualContentsAreEqualBytes) {
  const TempFolder folder;
  const std::vector<float> values{1, 2, 3};
  const auto write = [&](const std::string& name) {
    Hdf5File file = Hdf5File::create(folder / name);
    file.write_dataset("a/b/values", Dtype::F32, {3}, values.data());
    file.write_dataset("a/more", Dtype::F32, {3}, values.data());
    file.close();
  };
  write("one.h5");
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  write("other.h5");
  EXPECT_EQ(read_text_file(folder / "one.h5", 1 << 20), read_text_file(folder / "other.h5", 1 << 20));
}

TEST(Hdf5File, DamagedFilesAreRefused) {
  TempFolder dir;
  expect_contains(refusal([&] { Hdf5File::open(dir / "none.h5"); }), "No such file");
  put_file(dir / "text.h5", "not at all HDF5, but long enough to be looked at");
  expect_contains(refusal([&] { Hdf5File::open(dir / "text.h5"); }), "no HDF5 file");
  {
    auto file = Hdf5File::create(dir / "cut.h5");
    file.write_dataset("x", Dtype::F64, {1000}, std::vector<double>(1000).data());
    file.close();
  }
  std::filesystem::resize_file(dir / "cut.h5", std::filesystem::file_size(dir / "cut.h5") - 1);
  expect_contains(refusal([&] { Hdf5File::open(dir / "cut.h5"); }), "truncated");
  expect_contains(refusal([&] { Hdf5File::create(dir / "no/where.h5"); }), "cannot create");
}

// A writer that dies leaves a file that does not open, even if all its data were flushed.
TEST(Hdf5File, AnUncleanCloseIsRefused) {
  TempFolder dir;
  const pid_t child = fork();
  if (child == 0) {
    auto file = Hdf5File::create(dir / "dead.h5");
    file.write_dataset("x", Dtype::F64, {1000}, std::vector<double>(1000).data());
    raise(SIGKILL);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFSIGNALED(status));
  expect_contains(refusal([&] { Hdf5File::open(dir / "dead.h5"); }), "its writer was killed");
}

}  // namespace
}  // namespace dsa
