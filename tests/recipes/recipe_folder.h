// A scratch folder that the test works in, with files of its own; gone at the end.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace dsa {

class RecipeFolder {
 public:
  RecipeFolder() : before_(std::filesystem::current_path()) {
    std::string name = (std::filesystem::temp_directory_path() / "recipes_test_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) std::abort();
    folder_ = name;
    std::filesystem::current_path(folder_);
  }
  ~RecipeFolder() {
    std::filesystem::current_path(before_);
    std::filesystem::remove_all(folder_);
  }
  void write(const std::string& name, const std::string& text) const {
    if (std::filesystem::path(name).has_parent_path()) {
      std::filesystem::create_directories(std::filesystem::path(name).parent_path());
    }
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }

 private:
  std::filesystem::path before_, folder_;
};

// A complete recipe, for tests that change one thing.
inline const std::string kGood = R"(stage: WARMUP
init { from: "v31" }
data { tokens: "a.h5" sequence_length: 512 }
batch { sequences: 8 }
optimizer { lr: 1e-3 }
schedule { steps: 10 }
run { folder: "runs/a" }
)";

}  // namespace dsa
