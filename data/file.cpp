#include "data/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "data/error.h"

namespace dsa {
namespace {

constexpr uint64_t kMaxCall = uint64_t{1} << 30;  // Linux moves at most 2^31 - 4096 bytes a call

std::string errno_text() { return std::strerror(errno); }

}  // namespace

ReadFile::ReadFile(const std::string& path) : path_(path) {
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd_ < 0) throw InputError("cannot open " + path, errno_text(), "check the path and its permissions");
  struct stat st;
  if (::fstat(fd_, &st) != 0 || !S_ISREG(st.st_mode)) {
    ::close(fd_);
    throw InputError("cannot read " + path, "it is not a regular file", "give the path of a file");
  }
  size_ = static_cast<uint64_t>(st.st_size);
}

ReadFile::~ReadFile() { ::close(fd_); }

void ReadFile::read(uint64_t offset, uint64_t bytes, void* out) const {
  char* to = static_cast<char*>(out);
  while (bytes > 0) {
    const ssize_t got = ::pread(fd_, to, std::min(bytes, kMaxCall), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw InputError("cannot read " + path_, errno_text(), "check the disk or the network file system");
    if (got == 0)
      throw InputError("cannot read " + path_,
                       "it ends before byte " + std::to_string(offset + bytes) + " and had " + std::to_string(size_) +
                           " bytes when it was opened",
                       "leave files alone while they are read, then run again");
    to += got;
    offset += static_cast<uint64_t>(got);
    bytes -= static_cast<uint64_t>(got);
  }
}

TempFile::TempFile(const std::string& path) : path_(path) {
  static std::atomic<int> counter{0};
  temp_path_ = path + ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(counter++);
  fd_ = ::open(temp_path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0)
    throw InputError("cannot create " + temp_path_, errno_text(), "check that the folder exists and is writable");
}

TempFile::~TempFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temp_path_.c_str());
}

void TempFile::write(uint64_t offset, const void* bytes, uint64_t n) {
  const char* from = static_cast<const char*>(bytes);
  while (n > 0) {
    const ssize_t put = ::pwrite(fd_, from, std::min(n, kMaxCall), static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0)
      throw InputError("cannot write " + temp_path_, put < 0 ? errno_text() : "no byte was taken",
                       "free space on that disk and run again");
    from += put;
    offset += static_cast<uint64_t>(put);
    n -= static_cast<uint64_t>(put);
  }
}

void TempFile::resize(uint64_t bytes) {
  if (::ftruncate(fd_, static_cast<off_t>(bytes)) != 0)
    throw InputError("cannot extend " + temp_path_, errno_text(), "free space on that disk and run again");
}

void TempFile::publish(bool overwrite) {
  if (::fsync(fd_) != 0)
    throw InputError("cannot write " + temp_path_, errno_text(), "free space on that disk and run again");
  if (!overwrite && path_exists(path_))
    throw InputError("cannot write " + path_, "it exists already", "choose another name or remove that file first");
  if (::rename(temp_path_.c_str(), path_.c_str()) != 0)
    throw InputError("cannot write " + path_, errno_text(), "check that the folder is writable");
  ::close(fd_);
  fd_ = -1;
  const std::string parent = std::filesystem::path(path_).parent_path().string();
  sync_directory(parent.empty() ? "." : parent);
}

bool path_exists(const std::string& path) {
  struct stat st;
  return ::lstat(path.c_str(), &st) == 0;
}

std::string read_text_file(const std::string& path, uint64_t limit) {
  const ReadFile file(path);
  if (file.size() > limit)
    throw InputError("cannot read " + path,
                     std::to_string(file.size()) + " bytes are over the limit of " + std::to_string(limit),
                     "check that this is the file you meant");
  std::string text(file.size(), '\0');
  file.read(0, file.size(), text.data());
  return text;
}

void write_text_file(const std::string& path, const std::string& text, bool overwrite) {
  TempFile file(path);
  file.write(0, text.data(), text.size());
  file.publish(overwrite);
}

void sync_directory(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) throw InputError("cannot open " + path, errno_text(), "check that the folder exists");
  const bool ok = ::fsync(fd) == 0 || errno == EINVAL;  // EINVAL: this file system cannot sync folders
  const std::string why = errno_text();
  ::close(fd);
  if (!ok) throw InputError("cannot sync " + path, why, "check that disk");
}

}  // namespace dsa
