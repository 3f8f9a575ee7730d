#include "trainer/checkpoint/run_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "data/error.h"
#include "data/file.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;

std::string host_name() {
  char host[256] = "";
  ::gethostname(host, sizeof host - 1);
  return host;
}

// The boot's id and the process's start in ticks since then (field 22 of /proc/PID/stat, behind the name in
// parentheses); "" when there is no such process.
std::string start_of(long pid) {
  std::ifstream stat_file(fmt::format("/proc/{}/stat", pid)), boot_file("/proc/sys/kernel/random/boot_id");
  std::string stat, boot, field;
  std::getline(stat_file, stat);
  std::getline(boot_file, boot);
  const size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return "";
  std::istringstream rest(stat.substr(name_end + 2));
  std::string state;
  rest >> state;
  if (state == "Z") return "";  // a zombie holds nothing any more
  for (int i = 4; i <= 22; ++i) rest >> field;
  return boot + "/" + field;
}

}  // namespace

RunLock::RunLock(const std::string& run_folder) : file_((fs::path(run_folder) / "LOCK").string()) {
  const std::string host = host_name();
  owner_ = fmt::format("{} {} {}\n", host, ::getpid(), start_of(::getpid()));
  std::error_code failed;
  fs::create_directories(run_folder, failed);
  if (failed) throw InputError("cannot create the run folder " + run_folder, failed.message(), "choose another one");

  // Appears with its content at once (link), so nobody reads a half-written lock.
  const std::string temp = fmt::format("{}.{}.{}", file_, host, ::getpid());
  const int fd = ::open(temp.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  const bool wrote = fd >= 0 && ::write(fd, owner_.data(), owner_.size()) == static_cast<ssize_t>(owner_.size());
  std::string why = std::strerror(errno);
  if (fd >= 0) ::close(fd);
  const bool taken = wrote && ::link(temp.c_str(), file_.c_str()) == 0;
  const bool exists = wrote && !taken && errno == EEXIST;
  if (wrote && !taken) why = std::strerror(errno);
  ::unlink(temp.c_str());
  if (taken) return;
  if (!exists) throw InputError("cannot write to the run folder " + run_folder, why, "choose a writable one");

  // flock: of several processes that find the same dead owner, one at a time looks and takes over.
  const int lock = ::open(file_.c_str(), O_RDWR | O_CLOEXEC);
  if (lock < 0 || ::flock(lock, LOCK_EX) != 0) {
    why = std::strerror(errno);
    if (lock >= 0) ::close(lock);
    throw InputError("cannot take the lock " + file_, why, "when no run uses the folder, remove that file");
  }
  char text[512] = "";
  const ssize_t n = ::pread(lock, text, sizeof text - 1, 0);
  std::istringstream in(std::string(text, n > 0 ? n : 0));
  std::string other_host, other_start;
  long other_pid = 0;
  in >> other_host >> other_pid >> other_start;
  const bool here = other_host == host;
  if (here && start_of(other_pid) != other_start) {
    const bool ok = ::ftruncate(lock, 0) == 0 &&
                    ::pwrite(lock, owner_.data(), owner_.size(), 0) == static_cast<ssize_t>(owner_.size());
    why = std::strerror(errno);
    ::close(lock);
    if (!ok) throw InputError("cannot take over the lock " + file_, why, "free space on that disk");
    return;
  }
  ::close(lock);
  throw InputError("the run folder " + run_folder + " is in use",
                   fmt::format("by process {} on host {}", other_pid, other_host),
                   here ? "wait for it or choose another run folder"
                        : "wait for it, or remove " + file_ + " if that process is gone");
}

RunLock::~RunLock() {
  try {
    if (read_text_file(file_, 4096) == owner_) ::unlink(file_.c_str());
  } catch (const InputError&) {  // removed by hand: nothing to give back
  }
}

}  // namespace dsa
