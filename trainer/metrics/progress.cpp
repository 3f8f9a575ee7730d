#include "trainer/metrics/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>

namespace dsa {
namespace {

constexpr double kTerminalSeconds = 0.1;
constexpr double kLogSeconds = 10;
constexpr double kWorthMentioning = 2;

std::string amount(double value, const std::string& unit) {
  if (unit == "bytes") return fmt::format("{:.2f}", value / (1 << 30));
  std::string digits = fmt::format("{:.0f}", value);
  for (int at = static_cast<int>(digits.size()) - 3; at > 0; at -= 3) digits.insert(at, ",");
  return digits;
}

std::string time_text(double seconds) {
  const auto s = static_cast<int64_t>(std::llround(seconds));
  if (s < 60) return fmt::format("{}s", s);
  if (s < 3600) return fmt::format("{}m{:02}s", s / 60, s % 60);
  return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
}

}  // namespace

Progress::Sink Progress::standard_error() {
  return {stderr, isatty(STDERR_FILENO) == 1, [] {
            return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
          }};
}

Progress::Progress(std::string title, int64_t total, std::string unit, Sink sink)
    : title_(std::move(title)), unit_(std::move(unit)), total_(total), sink_(std::move(sink)), start_(sink_.clock()),
      shown_at_(start_) {}

void Progress::add(int64_t amount) {
  done_ += amount;
  const double now = sink_.clock();
  if (now - shown_at_ >= (sink_.terminal ? kTerminalSeconds : kLogSeconds)) show(now);
}

std::string Progress::text(double now) const {
  const std::string unit = unit_ == "bytes" ? "GiB" : unit_;
  const double seconds = now - start_;
  const double rate = seconds > 0 ? static_cast<double>(done_) / seconds : 0;
  std::string out = fmt::format("{}: {}", title_, amount(static_cast<double>(done_), unit_));
  if (total_ > 0) out += " / " + amount(static_cast<double>(total_), unit_);
  out += " " + unit;
  if (total_ > 0) out += fmt::format(" ({:.1f}%)", 100.0 * static_cast<double>(done_) / static_cast<double>(total_));
  out += fmt::format(", {:.3g} {}/s", unit_ == "bytes" ? rate / (1 << 30) : rate, unit);
  if (done_ >= total_) return out + ", " + time_text(seconds);
  if (rate > 0) out += ", eta " + time_text(static_cast<double>(total_ - done_) / rate);
  return out;
}

void Progress::show(double now) {
  std::string line = text(now);
  shown_at_ = now;
  shown_ = true;
  if (sink_.terminal) {
    width_ = std::max(width_, line.size());
    line.resize(width_, ' ');
    std::fprintf(sink_.file, "\r%s", line.c_str());
  } else {
    std::fprintf(sink_.file, "%s\n", line.c_str());
  }
  std::fflush(sink_.file);
}

Progress::~Progress() {
  const double now = sink_.clock();
  if (shown_ || now - start_ >= kWorthMentioning) show(now);
  if (shown_ && sink_.terminal) {
    std::fputc('\n', sink_.file);
    std::fflush(sink_.file);
  }
}

}  // namespace dsa
