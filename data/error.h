// The one exception of data/: something on disk cannot be used. Message: `problem (why) suggestion`.
#pragma once

#include <stdexcept>
#include <string>

namespace dsa {

class InputError : public std::runtime_error {
 public:
  InputError(const std::string& problem, const std::string& why, const std::string& suggestion)
      : std::runtime_error(problem + " (" + why + ") " + suggestion) {}
};

}  // namespace dsa
