#include "recipes/error.h"

#include <fmt/format.h>

#include <algorithm>

namespace dsa {
namespace {

// The caret line repeats the tabs of the text above it, so that both are indented alike.
std::string indent_like(const std::string& text, int columns) {
  std::string indent;
  for (int i = 0; i < columns; ++i) {
    indent += i < static_cast<int>(text.size()) && text[i] == '\t' ? '\t' : ' ';
  }
  return indent;
}

// A terminal shall not obey what a recipe holds.
std::string without_control_characters(std::string text) {
  for (char& c : text) {
    if ((static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f) c = '?';
  }
  return text;
}

std::string describe(const Problem& problem) {
  const Location& where = problem.where;
  std::string out = where.file;
  if (where.line > 0) out += fmt::format(":{}:{}", where.line, where.column);
  out += fmt::format(": error: {}\n", without_control_characters(problem.message));
  if (where.caret_column > 0) {
    const std::string number = where.line > 0 ? std::to_string(where.line) : "";
    out += fmt::format("{:>6} | {}\n", number, without_control_characters(where.text));
    out += fmt::format("{:>6} | {}{}", "", indent_like(where.text, where.caret_column - 1),
                       std::string(std::max(where.caret_length, 1), '^'));
    out += problem.fix.empty() ? "\n" : fmt::format(" {}\n", problem.fix);
  } else if (!problem.fix.empty()) {
    out += fmt::format("{:>6} | {}\n", "", problem.fix);
  }
  return out;
}

std::string describe_all(const std::vector<Problem>& problems) {
  std::string out;
  for (const Problem& problem : problems) out += describe(problem);
  return out + fmt::format("{} error{}. Nothing was launched. (exit 2)", problems.size(), problems.size() == 1 ? "" : "s");
}

}  // namespace

RecipeError::RecipeError(std::vector<Problem> problems)
    : std::runtime_error(describe_all(problems)), problems_(std::move(problems)) {}

}  // namespace dsa
