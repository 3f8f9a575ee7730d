#include "recipes/statements.h"

#include <fmt/format.h>
#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>
#include <optional>
#include <sstream>

namespace dsa {
namespace {

namespace io = google::protobuf::io;
using Token = io::Tokenizer::Token;

constexpr int kMaxDepth = 100;

// Tabs count as one column here and as up to eight in protobuf's tokenizer; it gets blanks instead, and values are
// cut out of the original.
std::string without_tabs(std::string text) {
  std::replace(text.begin(), text.end(), '\t', ' ');
  return text;
}

std::vector<std::string> split_lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    lines.push_back(line);
  }
  lines.emplace_back();  // the end of the file has a place too
  return lines;
}

struct SyntaxError {};  // thrown after its problem was recorded

class Scanner : private io::ErrorCollector {
 public:
  Scanner(const std::string& text, std::string file, bool numbered, std::vector<Problem>& problems)
      : lines_(split_lines(text)),
        file_(std::move(file)),
        numbered_(numbered),
        problems_(problems),
        plain_(without_tabs(text)),
        stream_(plain_.data(), static_cast<int>(plain_.size())),
        tokenizer_(&stream_, this) {
    tokenizer_.set_comment_style(io::Tokenizer::SH_COMMENT_STYLE);
    tokenizer_.set_allow_f_after_float(true);
    tokenizer_.set_require_space_after_number(false);  // `128K` gets a message of its own
  }

  void start() { next(); }

  // Appends as it reads, so that what stands before a syntax error is kept.
  void statements(std::vector<Statement>& out, const Token* open, int depth) {
    while (true) {
      if (token().type == io::Tokenizer::TYPE_END) {
        if (open == nullptr) return;
        fail(place(*open), fmt::format("\"{}\" is never closed", open->text), "add the closing brace");
      }
      if (open != nullptr && is_symbol(open->text == "{" ? '}' : '>')) return;
      statement(out, depth);
      if (is_symbol(',') || is_symbol(';')) next();
    }
  }

  RawValue value(const std::string& name) {
    const Token first = token();
    Token last = first;
    if (is_symbol('-')) next();
    if (token().type == io::Tokenizer::TYPE_STRING && first.text != "-") {
      while (token().type == io::Tokenizer::TYPE_STRING) {
        last = token();
        next();
      }
    } else if (token().type == io::Tokenizer::TYPE_INTEGER || token().type == io::Tokenizer::TYPE_FLOAT ||
               token().type == io::Tokenizer::TYPE_IDENTIFIER) {
      last = token();
      next();
    } else {
      fail(place(token()), fmt::format("\"{}\" has no value", name), "write a number, a name or a quoted string");
    }
    refuse_size_suffix(first, last);
    Location where = place(first);
    if (last.line == first.line) {
      where.caret_length = last.end_column - first.column;
      return {lines_[first.line].substr(first.column, where.caret_length), where};
    }
    std::string text = lines_[first.line].substr(first.column);
    for (int line = first.line + 1; line < last.line; ++line) text += "\n" + lines_[line];
    where.caret_length = first.end_column - first.column;
    return {text + "\n" + lines_[last.line].substr(0, last.end_column), where};
  }

  std::vector<RawValue> list(const std::string& name) {
    std::vector<RawValue> out;
    next();  // [
    if (is_symbol(']')) {
      next();
      return out;
    }
    while (true) {
      out.push_back(value(name));
      if (is_symbol(',')) {
        next();
        continue;
      }
      if (!is_symbol(']')) fail(place(token()), fmt::format("the list of \"{}\" is never closed", name), "expected , or ]");
      next();
      return out;
    }
  }

  void value_or_list(Statement& statement) {
    if (is_symbol('[')) {
      statement.kind = Statement::Kind::LIST;
      statement.values = list(statement.name);
    } else {
      statement.values.push_back(value(statement.name));
    }
  }

  bool at_end() { return token().type == io::Tokenizer::TYPE_END; }
  Location here() { return place(token()); }

  [[noreturn]] void fail(Location where, std::string message, std::string fix) {
    problems_.push_back({std::move(where), std::move(message), std::move(fix)});
    throw SyntaxError();
  }

 private:
  void AddError(int line, io::ColumnNumber column, const std::string& message) override {
    Token token;
    token.line = line;
    token.column = column;
    token.end_column = column + 1;
    if (!lexical_error_) lexical_error_ = Problem{place(token), "cannot read this: " + message, ""};
  }

  const Token& token() { return tokenizer_.current(); }
  void next() {
    tokenizer_.Next();
    if (lexical_error_) {
      problems_.push_back(*lexical_error_);
      throw SyntaxError();
    }
  }
  bool is_symbol(char symbol) {
    return token().type == io::Tokenizer::TYPE_SYMBOL && token().text.size() == 1 && token().text[0] == symbol;
  }

  Location place(const Token& token) const {
    const std::string& line = lines_[std::min<size_t>(token.line, lines_.size() - 1)];
    Location where{file_, numbered_ ? token.line + 1 : 0, token.column + 1, line, token.column + 1, 1};
    where.caret_length = std::max(token.end_column - token.column, 1);
    return where;
  }

  void statement(std::vector<Statement>& siblings, int depth) {
    const Token name = token();
    if (name.type != io::Tokenizer::TYPE_IDENTIFIER) {
      fail(place(name), fmt::format("expected a field's name, found {}", name.text), "");
    }
    next();
    Statement& out = siblings.emplace_back(Statement{name.text, place(name), Statement::Kind::VALUE, {}, {}});
    const bool colon = is_symbol(':');
    if (colon) next();
    if (is_symbol('{') || is_symbol('<')) {
      if (depth >= kMaxDepth) fail(place(token()), fmt::format("nested more than {} deep", kMaxDepth), "");
      const Token open = token();
      next();
      out.kind = Statement::Kind::MESSAGE;
      statements(out.children, &open, depth + 1);
      next();  // the closing brace
      return;
    }
    if (!colon) {
      fail(place(name), fmt::format("expected \":\" or \"{{\" after \"{}\"", name.text),
           fmt::format("write {}: value", name.text));
    }
    value_or_list(out);
  }

  void refuse_size_suffix(const Token& first, const Token& last) {
    const bool adjacent = token().type == io::Tokenizer::TYPE_IDENTIFIER && token().line == last.line &&
                          token().column == last.end_column && last.type != io::Tokenizer::TYPE_IDENTIFIER;
    if (!adjacent || last.type == io::Tokenizer::TYPE_STRING) return;
    Location where = place(first);
    where.caret_length = token().end_column - first.column;
    const std::string suffixes = "KMGT";
    const size_t power = suffixes.find(token().text);
    uint64_t number = 0;
    std::string fix = "write digits only";
    if (power != std::string::npos && last.type == io::Tokenizer::TYPE_INTEGER &&
        io::Tokenizer::ParseInteger(last.text, UINT64_MAX >> (10 * (power + 1)), &number)) {
      fix = fmt::format("write {} ({})", number << (10 * (power + 1)), last.text + token().text);
    }
    fail(where, fmt::format("{}{} is not a number", last.text, token().text), fix);
  }

  const std::vector<std::string> lines_;
  const std::string file_;
  const bool numbered_;
  std::vector<Problem>& problems_;
  const std::string plain_;
  io::ArrayInputStream stream_;
  std::optional<Problem> lexical_error_;
  io::Tokenizer tokenizer_;
};

}  // namespace

std::vector<Statement> scan_file(const std::string& text, const std::string& file, std::vector<Problem>& problems) {
  std::vector<Statement> out;
  Scanner scanner(text, file, true, problems);
  try {
    scanner.start();
    scanner.statements(out, nullptr, 0);
  } catch (const SyntaxError&) {
    // already among the problems
  }
  return out;
}

Statement scan_set(const std::string& assignment, bool is_string, std::vector<Problem>& problems) {
  const size_t equals = assignment.find('=');
  const int path_length = static_cast<int>(equals);
  const std::string raw = assignment.substr(equals + 1);
  Statement out{assignment.substr(0, equals), {"--set", 0, 1, assignment, 1, path_length}, Statement::Kind::VALUE, {}, {}};
  const bool quoted = !raw.empty() && (raw[0] == '"' || raw[0] == '\'' || raw[0] == '[');
  if (is_string && !quoted) {
    std::string literal = "\"";
    for (char c : raw) {
      if (c == '"' || c == '\\') literal += '\\';
      literal += c == '\n' ? std::string("\\n") : std::string(1, c);
    }
    const Location where{"--set", 0, path_length + 2, assignment, path_length + 2, static_cast<int>(raw.size())};
    out.values.push_back({literal + '"', where});
    return out;
  }
  Scanner scanner(std::string(equals + 1, ' ') + raw, "--set", false, problems);
  const size_t before = problems.size();
  try {
    scanner.start();
    scanner.value_or_list(out);
    if (!scanner.at_end()) scanner.fail(scanner.here(), "nothing may follow the value", "");
  } catch (const SyntaxError&) {
    out.values.clear();
  }
  // The scanner saw blanks for the path.
  for (size_t i = before; i < problems.size(); ++i) problems[i].where.text = assignment;
  for (RawValue& value : out.values) value.where.text = assignment;
  return out;
}

}  // namespace dsa
