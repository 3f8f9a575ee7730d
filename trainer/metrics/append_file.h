// A file that grows by whole records: a record that could not be written completely is cut off again.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace dsa {

class AppendFile {
 public:
  // Opens or creates. Throws std::system_error.
  explicit AppendFile(std::string path);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  // All of `record` reaches the operating system, or std::system_error is thrown and the file is as before.
  void append(std::string_view record);
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
};

}  // namespace dsa
