// Collects problems of named fields, each shown where the field was said.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "recipes/load.h"

namespace dsa {

class Checker {
 public:
  explicit Checker(const ResolvedRecipe& resolved) : resolved_(resolved) {}

  void add(const std::string& path, std::string message, std::string fix) {
    Location where = resolved_.origin(path).where;
    if (where.file.empty()) where.file = resolved_.file;  // a default
    problems_.push_back({std::move(where), std::move(message), std::move(fix)});
  }

  // `path=value`, as the user said it or as it became.
  std::string show(const std::string& path) const { return path + "=" + resolved_.origin(path).value; }

  template <class T>
  void at_least(const std::string& path, T value, T smallest) {
    if (!(value >= smallest) || !std::isfinite(static_cast<double>(value))) {
      add(path, fmt::format("{} is out of range", show(path)), fmt::format("{} or more", smallest));
    }
  }
  void above_zero(const std::string& path, double value) {
    if (!(value > 0) || !std::isfinite(value)) add(path, show(path) + " is out of range", "more than 0");
  }
  void below_one(const std::string& path, double value) {
    if (!(value >= 0 && value < 1)) add(path, show(path) + " is out of range", "0 or more, less than 1");
  }

  void throw_if_any() {
    if (!problems_.empty()) throw RecipeError(std::move(problems_));
  }
  std::vector<Problem> take() { return std::move(problems_); }

 private:
  const ResolvedRecipe& resolved_;
  std::vector<Problem> problems_;
};

// "1, 2, 4, 8": the divisors of n, at most the 16 smallest.
inline std::string divisors(int64_t n) {
  std::string out;
  int count = 0;
  for (int64_t d = 1; d <= n && d <= 65536 && count < 16; ++d) {
    if (n % d == 0) out += (count++ > 0 ? ", " : "") + std::to_string(d);
  }
  return out;
}

}  // namespace dsa
