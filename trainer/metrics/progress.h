// Progress of long work (load, save, export) on stderr: a line that overwrites itself on a terminal, else a line every
// 10 seconds, and one at the end of work that took longer than 2 seconds.
//   export: 1,204 / 92,425 tensors (1.3%), 12.4 /s, eta 2h02m
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>

namespace dsa {

class Progress {
 public:
  struct Sink {
    std::FILE* file = stderr;
    bool terminal = false;
    std::function<double()> clock;  // seconds, never going back
  };
  static Sink standard_error();

  // unit "bytes" is shown in GiB; total 0: unknown.
  Progress(std::string title, int64_t total, std::string unit, Sink sink = standard_error());
  ~Progress();  // ends the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void add(int64_t amount);

 private:
  std::string text(double now) const;
  void show(double now);

  const std::string title_, unit_;
  const int64_t total_;
  const Sink sink_;
  const double start_;
  double shown_at_;
  bool shown_ = false;
  size_t width_ = 0;  // of the longest line on a terminal, which later ones must cover
  int64_t done_ = 0;
};

}  // namespace dsa
