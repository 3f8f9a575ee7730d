#include "data/strict_json.h"

#include <set>

#include "data/error.h"

namespace dsa {

nlohmann::json parse_json_object(const std::string& text, const std::string& what, const std::string& suggestion,
                                 int max_depth) {
  using nlohmann::json;
  const auto refuse = [&](const std::string& why) { return InputError("cannot read " + what, why, suggestion); };
  if (text.empty() || text[0] != '{') throw refuse("the JSON text does not begin with '{'");
  if (text.find('\0') != std::string::npos) throw refuse("the JSON text holds a NUL byte");

  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (depth >= max_depth) throw refuse("JSON nested deeper than " + std::to_string(max_depth));
        if (event == json::parse_event_t::object_start) keys.emplace_back();
        break;
      case json::parse_event_t::object_end:
        keys.pop_back();
        break;
      case json::parse_event_t::key:
        if (!keys.back().insert(parsed.get<std::string>()).second)
          throw refuse("the key \"" + parsed.get<std::string>() + "\" is there twice");
        break;
      default:
        break;
    }
    return true;
  };
  try {
    return json::parse(text, watch);
  } catch (const json::exception& e) {
    throw refuse(e.what());
  }
}

}  // namespace dsa
