#include "recipes/assign.h"

#include <fmt/format.h>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <sstream>

#include "recipe.pb.h"
#include "recipes/spelling.h"

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

// All fields below `message`, as paths from the recipe's root.
void all_paths(const pb::Descriptor& message, const std::string& prefix, std::vector<std::string>& paths) {
  for (int i = 0; i < message.field_count(); ++i) {
    const pb::FieldDescriptor& field = *message.field(i);
    paths.push_back(prefix + field.name());
    if (is_message(field)) all_paths(*field.message_type(), prefix + field.name() + ".", paths);
  }
}

// The field of that name in another block, or the one of the nearest name there; empty when there is none.
std::string find_elsewhere(const std::string& name, bool exactly) {
  std::vector<std::string> paths, names;
  all_paths(*proto::Recipe::descriptor(), "", paths);
  for (const std::string& path : paths) names.push_back(path.substr(path.rfind('.') + 1));
  const std::string wanted = exactly ? name : closest(name, names);
  std::string found;
  for (size_t i = 0; i < paths.size(); ++i) {
    if (names[i] != wanted || wanted.empty()) continue;
    if (!found.empty()) return "";  // two blocks have one: no guess
    found = paths[i];
  }
  return found;
}

std::string unknown_field(const pb::Descriptor& message, const std::string& name) {
  std::string out = fmt::format("unknown field \"{}\" in {}", name, message.name());
  std::string guess = find_elsewhere(name, true);
  if (guess.empty()) guess = closest(name, field_names(message));
  if (guess.empty()) guess = find_elsewhere(name, false);
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
  Assigner(Assigned& assigned, std::vector<Problem>& problems) : assigned_(assigned), problems_(problems) {}

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
    bool all_read = true;
    for (const RawValue& value : statement.values) {
      if (!parse_value(field, value, message)) {
        Problem problem = refused(field, path, value);
        if (value.where.line == statement.where.line) problem.where.column = statement.where.column;
        problems_.push_back(std::move(problem));
        all_read = false;
      }
    }
    if (!all_read) {
      assigned_.unread.insert(path);
      return;
    }
    if (!statement.values.empty() && statement.values[0].where.line == where.line) {
      where.caret_column = statement.values[0].where.caret_column;
      where.caret_length = statement.values[0].where.caret_length;
    }
    if (!replace) return;  // a second element keeps the place of the first
    assigned_.said[path] = {where, origin};
    assigned_.unread.erase(path);
  }

 private:
  Assigned& assigned_;
  std::vector<Problem>& problems_;
};

}  // namespace

std::optional<std::string> parse_string(const RawValue& value) {
  proto::Recipe scratch;
  if (!parse_value(*proto::Recipe::descriptor()->FindFieldByName("extends"), value, scratch)) return std::nullopt;
  return scratch.extends();
}

void assign_file(const std::vector<Statement>& statements, const std::string& origin_kind, proto::Recipe& recipe,
                 Assigned& assigned, std::vector<Problem>& problems) {
  Assigner(assigned, problems).message(statements, "", origin_kind, recipe);
}

void assign_set(const std::string& assignment, proto::Recipe& recipe, Assigned& assigned,
                std::vector<Problem>& problems) {
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
  Assigner(assigned, problems).leaf(statement, full_path, *field, "command line", true, *message);
}

}  // namespace dsa
