#include "recipes/assign.h"

#include <fmt/format.h>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cctype>
#include <set>
#include <sstream>

#include "recipe.pb.h"

namespace dsa {
namespace {

namespace pb = google::protobuf;

class IgnoreErrors : public pb::io::ErrorCollector {
  void AddError(int, pb::io::ColumnNumber, const std::string&) override {}
};

bool is_message(const pb::FieldDescriptor& field) {
  return field.cpp_type() == pb::FieldDescriptor::CPPTYPE_MESSAGE;
}

std::vector<std::string> field_names(const pb::Descriptor& message) {
  std::vector<std::string> names;
  for (int i = 0; i < message.field_count(); ++i) names.push_back(message.field(i)->name());
  return names;
}

// All fields called `name` below `message`, as paths from the recipe's root.
void find_elsewhere(const pb::Descriptor& message, const std::string& prefix, const std::string& name,
                    std::vector<std::string>& paths) {
  for (int i = 0; i < message.field_count(); ++i) {
    const pb::FieldDescriptor& field = *message.field(i);
    if (field.name() == name) paths.push_back(prefix + name);
    if (is_message(field)) find_elsewhere(*field.message_type(), prefix + field.name() + ".", name, paths);
  }
}

std::string unknown_field(const pb::Descriptor& message, const std::string& name) {
  std::string out = fmt::format("unknown field \"{}\" in {}", name, message.name());
  std::vector<std::string> elsewhere;
  find_elsewhere(*proto::Recipe::descriptor(), "", name, elsewhere);
  const std::string guess = elsewhere.size() == 1 ? elsewhere[0] : closest(name, field_names(message));
  if (!guess.empty()) out += fmt::format("; did you mean \"{}\"?", guess);
  return out;
}

std::string all_names(const pb::EnumDescriptor& type) {
  std::string out;
  for (int i = 0; i < type.value_count(); ++i) out += (i > 0 ? ", " : "") + type.value(i)->name();
  return out;
}

// Why protobuf refused `text` for the field.
Problem refused(const pb::FieldDescriptor& field, const std::string& path, const RawValue& value) {
  const std::string said = fmt::format("{}={}", path, value.text);
  const bool digits = value.text.find_first_not_of("-0123456789") == std::string::npos;
  switch (field.cpp_type()) {
    case pb::FieldDescriptor::CPPTYPE_DOUBLE:
      return {value.where, said + " is not a number", "write digits, as in 1e-3"};
    case pb::FieldDescriptor::CPPTYPE_BOOL:
      return {value.where, said + " is neither true nor false", ""};
    case pb::FieldDescriptor::CPPTYPE_STRING:
      return {value.where, said + " is not a quoted string", fmt::format("write \"{}\"", value.text)};
    case pb::FieldDescriptor::CPPTYPE_ENUM: {
      std::vector<std::string> names;
      for (int i = 0; i < field.enum_type()->value_count(); ++i) names.push_back(field.enum_type()->value(i)->name());
      const std::string guess = closest(value.text, names);
      return {value.where, fmt::format("{} is not one of {}", said, all_names(*field.enum_type())),
              guess.empty() ? "" : fmt::format("did you mean {}?", guess)};
    }
    default:
      if (digits && (value.text[0] != '-' || field.cpp_type() != pb::FieldDescriptor::CPPTYPE_UINT64)) {
        return {value.where, fmt::format("{} is too large for {}", said, field.cpp_type_name()), ""};
      }
      if (digits) return {value.where, said + " is negative", "write 0 or more"};
      return {value.where, said + " is not a whole number", "write digits only"};
  }
}

bool parse_value(const pb::FieldDescriptor& field, const RawValue& value, pb::Message& message) {
  if (field.cpp_type() == pb::FieldDescriptor::CPPTYPE_ENUM && field.enum_type()->FindValueByName(value.text) == nullptr) {
    return false;  // protobuf would take any number here
  }
  if (field.cpp_type() == pb::FieldDescriptor::CPPTYPE_BOOL && value.text != "true" && value.text != "false") {
    return false;  // and t, True, 1 here
  }
  IgnoreErrors ignore;  // refused() words them
  pb::TextFormat::Parser parser;
  parser.RecordErrorsTo(&ignore);
  parser.SetRecursionLimit(100);
  return parser.ParseFieldValueFromString(value.text, &field, &message);
}

class Assigner {
 public:
  Assigner(SaidMap& said, std::vector<Problem>& problems) : said_(said), problems_(problems) {}

  void message(const std::vector<Statement>& statements, const std::string& prefix, const std::string& origin_kind,
               pb::Message& message) {
    const pb::Descriptor& type = *message.GetDescriptor();
    std::map<std::string, int> first_line;
    for (const Statement& statement : statements) {
      const std::string path = prefix + statement.name;
      const pb::FieldDescriptor* field = type.FindFieldByName(statement.name);
      if (field == nullptr) {
        problems_.push_back({statement.where, unknown_field(type, statement.name), ""});
        continue;
      }
      const auto [first, is_new] = first_line.emplace(statement.name, statement.where.line);
      if (!is_new && !field->is_repeated()) {
        problems_.push_back({statement.where, fmt::format("{} is said twice (first in line {})", path, first->second),
                             is_message(*field) ? "merge the two blocks" : "keep one"});
        continue;
      }
      if (is_message(*field) != (statement.kind == Statement::Kind::MESSAGE)) {
        problems_.push_back(is_message(*field)
                                ? Problem{statement.where, fmt::format("{} is a block of fields", path),
                                          fmt::format("write {} {{ ... }}", statement.name)}
                                : Problem{statement.where, fmt::format("{} is one value, not a block", path),
                                          fmt::format("write {}: value", statement.name)});
        continue;
      }
      if (is_message(*field)) {
        this->message(statement.children, path + ".", origin_kind, *message.GetReflection()->MutableMessage(&message, field));
        continue;
      }
      if (path == "extends") continue;
      const std::string origin = fmt::format("{} {}:{}", origin_kind, statement.where.file, statement.where.line);
      leaf(statement, path, *field, origin, is_new, message);
    }
  }

  // replace: forget a repeated field's earlier elements (those of a base file, or of an earlier --set).
  void leaf(const Statement& statement, const std::string& path, const pb::FieldDescriptor& field,
            const std::string& origin, bool replace, pb::Message& message) {
    if (statement.kind == Statement::Kind::VALUE && statement.values.empty()) return;  // a syntax error took it
    if (statement.kind == Statement::Kind::LIST && !field.is_repeated()) {
      problems_.push_back({statement.where, fmt::format("{} is one value, not a list", path), "drop the brackets"});
      return;
    }
    if (field.is_repeated() && replace) message.GetReflection()->ClearField(&message, &field);
    Location where = statement.where;
    bool first = true;
    for (const RawValue& value : statement.values) {
      if (!parse_value(field, value, message)) {
        Problem problem = refused(field, path, value);
        if (value.where.line == statement.where.line) problem.where.column = statement.where.column;
        problems_.push_back(std::move(problem));
        continue;
      }
      if (first && value.where.line == statement.where.line) {
        where.caret_column = value.where.caret_column;
        where.caret_length = value.where.caret_length;
      }
      first = false;
    }
    if (replace) said_[path] = {where, origin};
  }

 private:
  SaidMap& said_;
  std::vector<Problem>& problems_;
};

}  // namespace

std::string closest(const std::string& name, const std::vector<std::string>& candidates) {
  // Edits (insert, delete, replace, swap of neighbours) between the two, upper and lower case alike.
  const auto distance = [](const std::string& a, const std::string& b) {
    std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
    const auto same = [&](size_t i, size_t j) { return std::tolower(a[i - 1]) == std::tolower(b[j - 1]); };
    for (size_t i = 0; i <= a.size(); ++i) {
      for (size_t j = 0; j <= b.size(); ++j) {
        if (i == 0 || j == 0) {
          d[i][j] = i + j;
          continue;
        }
        d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (same(i, j) ? 0 : 1)});
        if (i > 1 && j > 1 && same(i, j - 1) && same(i - 1, j)) d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
    return d[a.size()][b.size()];
  };
  if (name.size() > 64) return "";
  std::string best;
  size_t best_distance = std::max<size_t>(1, name.size() / 3) + 1;
  for (const std::string& candidate : candidates) {
    const size_t edits = distance(name, candidate);
    if (edits < best_distance) {
      best = candidate;
      best_distance = edits;
    }
  }
  return best;
}

void assign_file(const std::vector<Statement>& statements, const std::string& origin_kind, proto::Recipe& recipe,
                 SaidMap& said, std::vector<Problem>& problems) {
  Assigner(said, problems).message(statements, "", origin_kind, recipe);
}

void assign_set(const std::string& assignment, proto::Recipe& recipe, SaidMap& said, std::vector<Problem>& problems) {
  const size_t equals = assignment.find('=');
  const Location whole{"--set", 0, 1, assignment, 1, static_cast<int>(std::max<size_t>(assignment.size(), 1))};
  if (equals == std::string::npos || equals == 0) {
    problems.push_back({whole, "expected path=value", "as in --set optimizer.lr=1e-4"});
    return;
  }
  pb::Message* message = &recipe;
  std::istringstream path(assignment.substr(0, equals));
  int column = 1;
  const pb::FieldDescriptor* field = nullptr;
  for (std::string name; std::getline(path, name, '.'); column += static_cast<int>(name.size()) + 1) {
    const Location where{"--set", 0, column, assignment, column, static_cast<int>(std::max<size_t>(name.size(), 1))};
    if (field != nullptr) {
      if (!is_message(*field)) {
        problems.push_back({where, fmt::format("{} has no fields", field->name()), ""});
        return;
      }
      message = message->GetReflection()->MutableMessage(message, field);
    }
    field = message->GetDescriptor()->FindFieldByName(name);
    if (field == nullptr) {
      problems.push_back({where, unknown_field(*message->GetDescriptor(), name), ""});
      return;
    }
  }
  const std::string full_path = assignment.substr(0, equals);
  if (full_path == "extends") {
    problems.push_back({whole, "extends belongs in a recipe file", "pass that file as the recipe instead"});
    return;
  }
  if (is_message(*field)) {
    problems.push_back({whole, fmt::format("{} is a block of fields", full_path),
                        fmt::format("name one, as in {}.{}", full_path, field->message_type()->field(0)->name())});
    return;
  }
  const bool is_string = field->cpp_type() == pb::FieldDescriptor::CPPTYPE_STRING;
  const Statement statement = scan_set(assignment, is_string, problems);
  Assigner(said, problems).leaf(statement, full_path, *field, "command line", true, *message);
}

}  // namespace dsa
