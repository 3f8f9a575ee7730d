#include "recipes/load.h"

#include <fmt/format.h>
#include <google/protobuf/text_format.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "recipe.pb.h"
#include "recipes/assign.h"
#include "recipes/convert.h"
#include "recipes/statements.h"
#include "recipes/validate.h"

namespace dsa {
namespace {

namespace fs = std::filesystem;
namespace pb = google::protobuf;

constexpr size_t kMaxBytes = size_t{1} << 20;
constexpr size_t kMaxExtends = 8;

// Replaces every ${NAME:?} and ${NAME:?what it is} by the environment's NAME.
std::string expand_environment(const std::string& text, const Location& where, std::vector<Problem>& problems) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t open = text.find("${", at);
    out += text.substr(at, open - at);
    if (open == std::string::npos) break;
    const size_t close = text.find('}', open);
    const std::string inside = close == std::string::npos ? "" : text.substr(open + 2, close - open - 2);
    const size_t mark = inside.find(":?");
    if (mark == std::string::npos || mark == 0) {
      problems.push_back({where, fmt::format("cannot expand {}", text.substr(open, close - open + 1)),
                          "write ${NAME:?}; NAME must be set and not empty"});
      return text;
    }
    const std::string name = inside.substr(0, mark);
    const char* value = std::getenv(name.c_str());
    if (value == nullptr || *value == '\0') {
      const std::string meaning = inside.substr(mark + 2);
      problems.push_back({where, fmt::format("the environment variable {} is not set{}", name,
                                             meaning.empty() ? "" : fmt::format(" ({})", meaning)),
                          fmt::format("export {}=..., or override the field with --set", name)});
      return text;
    }
    out += value;
    at = close + 1;
  }
  return out;
}

class Loader {
 public:
  ResolvedRecipe load(const std::string& path, const std::vector<std::string>& sets) {
    read_file(path, {path, 0, 0, "", 0, 0}, "recipe");
    for (const std::string& assignment : sets) assign_set(assignment, message_, assigned_, problems_);
    const bool all_read = problems_.empty();

    ResolvedRecipe out;
    out.file = path;
    out.recipe = to_recipe(message_);
    resolve(out.recipe);
    list_values(out);
    // What could not be read must not be reported again as missing, nor as a contradiction of what stands in its place.
    note(find_out_of_range(out));
    if (!cut_short_) note(find_contradictions(out, assigned_.unread));
    if (all_read) note(find_missing(out));
    if (!problems_.empty()) throw RecipeError(in_reading_order(std::move(problems_)));
    return out;
  }

 private:
  // Files in the order of their first problem, their lines ascending; the command line where it was found.
  static std::vector<Problem> in_reading_order(std::vector<Problem> problems) {
    std::map<std::string, int> rank;
    for (const Problem& problem : problems) rank.emplace(problem.where.file, static_cast<int>(rank.size()));
    const auto key = [&](const Location& where) {
      return std::tuple(rank[where.file], where.line, where.line > 0 ? where.column : 0);
    };
    std::stable_sort(problems.begin(), problems.end(), [&](const Problem& a, const Problem& b) {
      return key(a.where) < key(b.where);
    });
    return problems;
  }

  // asked_from: the `extends` that names this file (line 0: the command line).
  void read_file(const std::string& path, const Location& asked_from, const std::string& origin_kind) {
    std::error_code ignored;  // reading the file says what is wrong with the path
    const fs::path real = fs::weakly_canonical(path, ignored);
    for (const fs::path& open : chain_) {
      if (open == real) return refuse(asked_from, fmt::format("{} extends itself", path), "break the circle");
    }
    if (chain_.size() >= kMaxExtends) {
      return refuse(asked_from, fmt::format("more than {} files extend one another", kMaxExtends), "merge some");
    }
    std::string text;
    if (!read_text(path, asked_from, text)) return;
    const size_t before = problems_.size();
    const std::vector<Statement> statements = scan_file(text, path, problems_);
    cut_short_ = cut_short_ || problems_.size() > before;
    chain_.push_back(real);
    for (const Statement& statement : statements) {
      if (statement.name == "extends" && statement.values.size() == 1) {
        read_base(path, statement);
        break;
      }
    }
    chain_.pop_back();
    assign_file(statements, origin_kind, message_, assigned_, problems_);
  }

  void read_base(const std::string& path, const Statement& statement) {
    Location where = statement.values[0].where;
    where.column = statement.where.column;
    const std::optional<std::string> said = parse_string(statement.values[0]);
    if (!said || said->empty()) {
      return refuse(where, "extends does not name a file", "write extends: \"base.textproto\"");
    }
    const std::string base = expand_environment(*said, where, problems_);
    read_file((fs::path(path).parent_path() / base).lexically_normal(), where, "base");
  }

  bool read_text(const std::string& path, const Location& asked_from, std::string& text) {
    std::error_code ignored;
    if (fs::is_directory(path, ignored)) {
      refuse(asked_from, fmt::format("{} is a folder, not a recipe", path), "name a .textproto file");
      return false;
    }
    std::ifstream file(path, std::ios::binary);
    if (!file) {
      const std::string why = std::strerror(errno);
      refuse(asked_from, fmt::format("cannot read {} ({})", path, why), "check the path");
      return false;
    }
    for (char block[16384]; text.size() <= kMaxBytes && (file.read(block, sizeof block), file.gcount() > 0);) {
      text.append(block, static_cast<size_t>(file.gcount()));
    }
    if (text.size() > kMaxBytes) {
      refuse(asked_from, fmt::format("{} is larger than 1 MiB", path), "a recipe is a few KiB: is this the right file?");
      return false;
    }
    return true;
  }

  void note(std::vector<Problem> problems) {
    for (Problem& problem : problems) problems_.push_back(std::move(problem));
  }

  void refuse(const Location& where, std::string message, std::string fix) {
    problems_.push_back({where, std::move(message), std::move(fix)});
  }

  Location where(const std::string& path) const {
    const auto found = assigned_.said.find(path);
    return found == assigned_.said.end() ? Location{} : found->second.where;
  }

  // What the schema cannot say: values that follow from others, and paths.
  void resolve(Recipe& r) {
    if (!assigned_.said.contains("optimizer.indexer_lr")) r.optimizer.indexer_lr = r.optimizer.lr;
    if (!assigned_.said.contains("schedule.final_lr") && r.schedule.decay == Decay::CONSTANT) r.schedule.final_lr = r.optimizer.lr;
    if (!assigned_.said.contains("run.eval_sequences")) r.run.eval_sequences = r.data.held_out;

    r.init.from = expand_environment(r.init.from, where("init.from"), problems_);
    r.run.folder = expand_environment(r.run.folder, where("run.folder"), problems_);
    for (std::string& tokens : r.data.tokens) tokens = expand_environment(tokens, where("data.tokens"), problems_);
    if (!r.model.config.empty()) find_config(r.model.config);
  }

  void find_config(std::string& config) {
    const Location place = where("model.config");
    config = expand_environment(config, place, problems_);
    // operator/ keeps an absolute config as it is; a path of the command line is beside no file.
    const fs::path beside = (fs::path(place.line > 0 ? place.file : "").parent_path() / config).lexically_normal();
    std::error_code ignored;
    if (fs::exists(beside, ignored)) {
      config = beside;
    } else if (!fs::exists(config, ignored)) {
      refuse(place, fmt::format("model.config={} does not exist{}", config,
                                beside == config ? "" : fmt::format(" (nor does {})", beside.string())),
             "name a HuggingFace config.json");
    }
  }

  void list_values(ResolvedRecipe& out) const {
    proto::Recipe full;
    to_message(out.recipe, full);
    out.text = to_text(out.recipe);
    const XXH128_hash_t hash = XXH3_128bits(out.text.data(), out.text.size());
    out.digest = fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
    list_message(full, "", out.values);
  }

  void list_message(const pb::Message& message, const std::string& prefix, std::vector<Origin>& out) const {
    const pb::Reflection& reflection = *message.GetReflection();
    pb::TextFormat::Printer printer;
    printer.SetUseUtf8StringEscaping(true);
    for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
      const pb::FieldDescriptor& field = *message.GetDescriptor()->field(i);
      const std::string path = prefix + field.name();
      if (path == "extends") continue;
      if (field.cpp_type() == pb::FieldDescriptor::CPPTYPE_MESSAGE) {
        list_message(reflection.GetMessage(message, &field), path + ".", out);
        continue;
      }
      std::string value;
      if (field.is_repeated()) {
        for (int k = 0; k < reflection.FieldSize(message, &field); ++k) {
          std::string item;
          printer.PrintFieldValueToString(message, &field, k, &item);
          value += (k > 0 ? ", " : "") + item;
        }
        value = "[" + value + "]";
      } else if (reflection.HasField(message, &field)) {
        printer.PrintFieldValueToString(message, &field, -1, &value);
      }
      const auto said = assigned_.said.find(path);
      if (said == assigned_.said.end()) {
        out.push_back({path, value, "default", {}});
      } else {
        out.push_back({path, value, said->second.origin, said->second.where});
      }
    }
  }

  proto::Recipe message_;
  Assigned assigned_;
  bool cut_short_ = false;  // a syntax error ended a file early
  std::vector<Problem> problems_;
  std::vector<fs::path> chain_;  // the files being read, outermost first
};

}  // namespace

const Origin& ResolvedRecipe::origin(const std::string& path) const {
  for (const Origin& value : values) {
    if (value.path == path) return value;
  }
  throw std::out_of_range("no field " + path + " in a recipe");
}

bool ResolvedRecipe::is_set(const std::string& path) const { return origin(path).origin != "default"; }

ResolvedRecipe load_recipe(const std::string& path, const std::vector<std::string>& sets) {
  return Loader().load(path, sets);
}

}  // namespace dsa
