// The outline of a text-format file: names, positions and the raw text of values. What a value means is decided by
// protobuf's own parser (assign.h); the outline exists so that every error can be found and shown at its place, where
// protobuf's parser stops at the first one.
//
//   file      = { statement }
//   statement = NAME ( [":"] "{" { statement } "}" | ":" value | ":" "[" [ value { "," value } ] "]" ) [ "," | ";" ]
//   value     = [ "-" ] NUMBER | NAME | STRING { STRING }                     "#" begins a comment
// as in protobuf's text format (also "<" ... ">"), without extensions and Any.
#pragma once

#include <string>
#include <vector>

#include "recipes/error.h"

namespace dsa {

struct RawValue {
  std::string text;  // exactly as written
  Location where;    // caret under the value
};

struct Statement {
  enum class Kind { VALUE, LIST, MESSAGE };
  std::string name;
  Location where;  // caret under the name
  Kind kind = Kind::VALUE;
  std::vector<RawValue> values;     // VALUE: one, LIST: any number
  std::vector<Statement> children;  // MESSAGE
};

// Reads the outline of a file's text. A syntax error is appended to problems and ends the outline there; a statement
// cut short by it has no values.
std::vector<Statement> scan_file(const std::string& text, const std::string& file, std::vector<Problem>& problems);

// Reads the value of `path=value` (a value or a list; with is_string one that needs no quotes). Statement.name and
// .where are those of the path.
Statement scan_set(const std::string& assignment, bool is_string, std::vector<Problem>& problems);

}  // namespace dsa
