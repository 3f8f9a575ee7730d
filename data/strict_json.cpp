#include "data/strict_json.h"

#include "data/error.h"

namespace dsa {
namespace {

using nlohmann::json;

// Builds the document event by event. nlohmann's own callback parser would look through all members of the parent
// at the end of every object: minutes for a header of 92,000 tensors.
class Builder : public nlohmann::json_sax<json> {
 public:
  Builder(json& root, size_t max_depth) : root_(root), max_depth_(max_depth) {}
  const std::string& why() const { return why_; }

  bool null() override { return put(nullptr); }
  bool boolean(bool v) override { return put(v); }
  bool number_integer(number_integer_t v) override { return put(v); }
  bool number_unsigned(number_unsigned_t v) override { return put(v); }
  bool number_float(number_float_t v, const string_t&) override { return put(v); }
  bool string(string_t& v) override { return put(std::move(v)); }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override { return open(json::object()); }
  bool start_array(size_t) override { return open(json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& v) override {
    const auto [member, is_new] = open_.back()->emplace(v, nullptr);
    if (!is_new) return refuse("the key \"" + v + "\" is there twice");
    member_ = &*member;
    return true;
  }
  bool parse_error(size_t, const std::string&, const json::exception& e) override { return refuse(e.what()); }

 private:
  bool refuse(std::string why) {
    why_ = std::move(why);
    return false;
  }
  json* place(json value) {
    if (open_.empty()) return &(root_ = std::move(value));
    if (open_.back()->is_object()) return &(*member_ = std::move(value));
    open_.back()->push_back(std::move(value));
    return &open_.back()->back();
  }
  bool put(json value) {
    place(std::move(value));
    return true;
  }
  bool open(json value) {
    if (open_.size() == max_depth_) return refuse("JSON nested deeper than " + std::to_string(max_depth_));
    open_.push_back(place(std::move(value)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  json& root_;
  size_t max_depth_;
  std::vector<json*> open_;  // from the root to the innermost; each is the last child of the one before, so it stays put
  json* member_ = nullptr;   // the value of the last key
  std::string why_;
};

}  // namespace

json parse_json_object(const std::string& text, const std::string& what, const std::string& suggestion, int max_depth) {
  const auto refuse = [&](const std::string& why) { return InputError("cannot read " + what, why, suggestion); };
  if (text.empty() || text[0] != '{') throw refuse("the JSON text does not begin with '{'");
  if (text.find('\0') != std::string::npos) throw refuse("the JSON text holds a NUL byte");
  json root;
  Builder builder(root, static_cast<size_t>(max_depth));
  if (!json::sax_parse(text, &builder)) throw refuse(builder.why());
  return root;
}

}  // namespace dsa
