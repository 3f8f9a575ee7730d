// POSIX files with every return value checked. Offsets and sizes in bytes; errors are InputError with errno's text.
#pragma once

#include <cstdint>
#include <string>

namespace dsa {

// A regular file opened for reading; its size is the one at opening.
class ReadFile {
 public:
  explicit ReadFile(const std::string& path);
  ~ReadFile();
  ReadFile(const ReadFile&) = delete;
  ReadFile& operator=(const ReadFile&) = delete;

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  void read(uint64_t offset, uint64_t bytes, void* out) const;

 private:
  std::string path_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

// A file under construction: `path`.tmp-<pid>-<n>, removed by the destructor unless publish() renamed it.
class TempFile {
 public:
  explicit TempFile(const std::string& path);
  ~TempFile();
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;

  void write(uint64_t offset, const void* bytes, uint64_t n);
  void resize(uint64_t bytes);
  void publish(bool overwrite);  // fsync, rename to `path`, fsync the directory; refuses an existing path unless overwrite

 private:
  std::string path_, temp_path_;
  int fd_ = -1;
};

bool path_exists(const std::string& path);
std::string read_text_file(const std::string& path, uint64_t limit);  // refuses files over `limit` bytes
void write_text_file(const std::string& path, const std::string& text, bool overwrite);  // through TempFile
void sync_directory(const std::string& path);

}  // namespace dsa
