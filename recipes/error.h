// Everything wrong with a recipe, in one exception (exit code 2), printed as
//   run.textproto:14:3: error: parallel.expert=48 does not divide the model's 256 routed experts
//      14 |   expert: 48
//         |           ^^ try 32 or 64
//   1 error. Nothing was launched. (exit 2)
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace dsa {

// Where a value was said. line 0: not in a file (file is then `--set`, or the recipe for something missing).
// Columns count from 1, in bytes.
struct Location {
  std::string file;
  int line = 0;
  int column = 0;        // of the field's name
  std::string text;      // the whole line
  int caret_column = 0;  // of the value (or of what is wrong); 0: no caret
  int caret_length = 0;
};

struct Problem {
  Location where;
  std::string message;
  std::string fix;  // may be empty
};

class RecipeError : public std::runtime_error {
 public:
  explicit RecipeError(std::vector<Problem> problems);
  const std::vector<Problem>& problems() const { return problems_; }

 private:
  std::vector<Problem> problems_;
};

}  // namespace dsa
