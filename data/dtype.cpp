#include "data/dtype.h"

#include <array>

namespace dsa {
namespace {

struct Row {
  std::string name;
  int bits;
};

const std::array<Row, 22>& rows() {  // in the order of the enum
  static const std::array<Row, 22> table{{
      {"BOOL", 8}, {"F4", 4}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8}, {"I8", 8}, {"F8_E5M2", 8}, {"F8_E4M3", 8},
      {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16}, {"U16", 16}, {"F16", 16}, {"BF16", 16},
      {"I32", 32}, {"U32", 32}, {"F32", 32}, {"C64", 64}, {"F64", 64}, {"I64", 64}, {"U64", 64}}};
  return table;
}

}  // namespace

int bits(Dtype dtype) { return rows()[static_cast<size_t>(dtype)].bits; }

const std::string& name(Dtype dtype) { return rows()[static_cast<size_t>(dtype)].name; }

std::optional<Dtype> parse_dtype(const std::string& name) {
  for (size_t i = 0; i < rows().size(); ++i)
    if (rows()[i].name == name) return static_cast<Dtype>(i);
  return std::nullopt;
}

}  // namespace dsa
