// TensorBoard event files. A record is
//   u64 length | u32 masked_crc(the 8 bytes before) | payload | u32 masked_crc(payload)        little-endian
//   masked_crc(x) = rotate_right(crc32c(x), 15) + 0xa282ead8
// and the payload an Event of event.proto. The first record says file_version "brain.Event:2"; the file's name is
// events.out.tfevents.SECONDS.HOST.PID.UID. (Format: tensorflow/core/lib/io/record_writer.h, summary/writer.)
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace dsa {

class AppendFile;

struct Scalar {
  std::string tag;
  double value;  // stored as float
};

uint32_t masked_crc32c(std::string_view bytes);
std::string frame_record(std::string_view payload);

class EventWriter {
 public:
  // Starts a new file in the existing `folder`, named so that it sorts after those of earlier runs. first_step > 1: a
  // resumed run, so readers are told to forget what was recorded for first_step and later. Throws std::system_error.
  EventWriter(const std::string& folder, int64_t first_step);
  ~EventWriter();

  // One record with all scalars, handed to the operating system before it returns. Throws std::system_error.
  void write(int64_t step, double wall_time, const std::vector<Scalar>& scalars);
  const std::string& path() const;

 private:
  std::unique_ptr<AppendFile> file_;
};

}  // namespace dsa
