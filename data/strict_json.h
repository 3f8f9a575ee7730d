// JSON from strangers: UTF-8, one object from the first byte on, no key twice, nesting bounded, numbers not bent
// (nlohmann alone keeps the last of two equal keys and takes a NUL for the end of the text).
#pragma once

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace dsa {

// Throws InputError; `what` names the text in messages.
nlohmann::json parse_json_object(const std::string& text, const std::string& what, const std::string& suggestion,
                                 int max_depth);

}  // namespace dsa
