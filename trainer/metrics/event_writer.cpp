#include "trainer/metrics/event_writer.h"

#include <fmt/format.h>
#include <isa-l/crc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdlib>
#include <filesystem>

#include "event.pb.h"
#include "trainer/metrics/append_file.h"

namespace dsa {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr std::string_view kPrefix = "events.out.tfevents.";

template <class T>
std::string bytes_of(T number) {
  return std::string(reinterpret_cast<const char*>(&number), sizeof number);
}

double now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// Readers take the files of a folder in the order of their names, so a run that resumes within the second of its
// predecessor (or after the clock was set back) must not sort before it.
int64_t start_second(const std::string& folder) {
  int64_t second = static_cast<int64_t>(now());
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with(kPrefix)) continue;
    second = std::max<int64_t>(second, std::strtoll(name.c_str() + kPrefix.size(), nullptr, 10) + 1);
  }
  return second;
}

std::string file_name(const std::string& folder) {
  static std::atomic<int> uid{0};
  char host[256] = {};
  if (gethostname(host, sizeof host - 1) != 0) host[0] = '?';
  return fmt::format("{}{:010}.{}.{}.{}", kPrefix, start_second(folder), host, getpid(), uid++);
}

std::string record(const events::Event& event) { return frame_record(event.SerializeAsString()); }

}  // namespace

uint32_t masked_crc32c(std::string_view bytes) {
  // ISA-L takes a non-const pointer and starts from what it is given, without the customary inversions.
  auto* data = reinterpret_cast<unsigned char*>(const_cast<char*>(bytes.data()));
  const uint32_t crc = ~crc32_iscsi(data, static_cast<int>(bytes.size()), 0xffffffffu);
  return std::rotr(crc, 15) + 0xa282ead8u;
}

std::string frame_record(std::string_view payload) {
  const std::string length = bytes_of(static_cast<uint64_t>(payload.size()));
  return length + bytes_of(masked_crc32c(length)) + std::string(payload) + bytes_of(masked_crc32c(payload));
}

EventWriter::EventWriter(const std::string& folder, int64_t first_step)
    : file_(std::make_unique<AppendFile>(folder + "/" + file_name(folder))) {
  events::Event version;
  version.set_wall_time(now());
  version.set_file_version("brain.Event:2");
  std::string head = record(version);
  if (first_step > 1) {
    events::Event start;
    start.set_wall_time(now());
    start.set_step(first_step);
    start.mutable_session_log()->set_status(events::SessionLog::START);
    head += record(start);
  }
  file_->append(head);
}

EventWriter::~EventWriter() = default;

void EventWriter::write(int64_t step, double wall_time, const std::vector<Scalar>& scalars) {
  events::Event event;
  event.set_wall_time(wall_time);
  event.set_step(step);
  for (const Scalar& scalar : scalars) {
    events::Summary::Value* value = event.mutable_summary()->add_value();
    value->set_tag(scalar.tag);
    value->set_simple_value(static_cast<float>(scalar.value));
  }
  file_->append(record(event));
}

const std::string& EventWriter::path() const { return file_->path(); }

}  // namespace dsa
