#include "trainer/checkpoint/save_plan.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace dsa {
namespace {

using Key = std::pair<Role, std::string>;

struct Copies {
  std::vector<std::pair<int, size_t>> holders;  // rank, index in its list
};

struct Tensor {
  Dtype dtype;
  std::vector<int64_t> shape;
  std::map<std::pair<std::vector<int64_t>, std::vector<int64_t>>, Copies> boxes;  // by offset, extent
};

struct Piece {
  uint64_t bytes;
  const Copies* copies;
  Box box;
};

std::map<Key, Tensor> tensors_of(const std::vector<std::vector<HeldBox>>& held) {
  std::map<Key, Tensor> tensors;
  for (size_t rank = 0; rank < held.size(); ++rank)
    for (size_t i = 0; i < held[rank].size(); ++i) {
      const HeldBox& h = held[rank][i];
      auto [at, fresh] = tensors.try_emplace({h.role, h.box.name}, Tensor{h.dtype, h.box.global_shape, {}});
      if (!fresh && (at->second.dtype != h.dtype || at->second.shape != h.box.global_shape))
        throw std::invalid_argument("cannot save " + role_name(h.role) + " of " + h.box.name + " (rank " +
                                    std::to_string(rank) + " gives it another shape or dtype than a rank before) " +
                                    "all ranks must describe a tensor alike");
      if (numel(h.box) == 0) continue;
      auto& holders = at->second.boxes[{h.box.offset, h.box.extent}].holders;
      if (!holders.empty() && holders.back().first == static_cast<int>(rank))
        throw std::invalid_argument("cannot save " + role_name(h.role) + " of " + h.box.name + " (rank " +
                                    std::to_string(rank) + " gives the same box twice) list each box once");
      holders.push_back({static_cast<int>(rank), i});
    }
  for (const auto& [key, tensor] : tensors) {
    std::vector<Box> boxes;
    for (const auto& [place, copies] : tensor.boxes) boxes.push_back({place.first, place.second});
    const std::string hole = why_not_covered(boxes, tensor.shape);
    if (!hole.empty())
      throw std::invalid_argument("cannot save " + role_name(key.first) + " of " + key.second + " (" + hole +
                                  ") the ranks' boxes must cover it once");
  }
  return tensors;
}

// Row ranges of a box, each at most piece_bytes (a row at least).
void cut_rows(const Box& box, Dtype dtype, uint64_t piece_bytes, const Copies& copies, std::vector<Piece>& out) {
  const uint64_t bytes = bytes_of(dtype, box.extent);
  const int64_t rows = box.extent.empty() ? 1 : box.extent[0];
  const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(piece_bytes / std::max<uint64_t>(bytes / rows, 1)));
  for (int64_t row = 0; row < rows; row += step) {
    Box piece = box;
    if (!box.extent.empty()) {
      piece.offset[0] += row;
      piece.extent[0] = std::min(step, rows - row);
    }
    out.push_back({bytes_of(dtype, piece.extent), &copies, std::move(piece)});
  }
}

}  // namespace

uint64_t bytes_of(Dtype dtype, const std::vector<int64_t>& extent) {
  return static_cast<uint64_t>(numel(extent)) * bits(dtype) / 8;
}

std::vector<std::vector<PlannedPiece>> plan_writers(const std::vector<std::vector<HeldBox>>& held,
                                                    uint64_t piece_bytes) {
  const std::map<Key, Tensor> tensors = tensors_of(held);
  std::vector<std::vector<PlannedPiece>> plan(held.size());
  std::vector<uint64_t> load(held.size(), 0);
  std::vector<Piece> shared;
  for (const auto& [key, tensor] : tensors)
    for (const auto& [place, copies] : tensor.boxes) {
      const Box box{place.first, place.second};
      if (copies.holders.size() > 1) {
        cut_rows(box, tensor.dtype, piece_bytes, copies, shared);
        continue;
      }
      const auto [rank, index] = copies.holders[0];
      plan[rank].push_back({index, box});
      load[rank] += bytes_of(tensor.dtype, box.extent);
    }
  std::stable_sort(shared.begin(), shared.end(), [](const Piece& a, const Piece& b) { return a.bytes > b.bytes; });
  for (const Piece& piece : shared) {
    const auto& holders = piece.copies->holders;
    const auto least = *std::min_element(holders.begin(), holders.end(), [&](const auto& a, const auto& b) {
      return std::tie(load[a.first], a.first) < std::tie(load[b.first], b.first);
    });
    plan[least.first].push_back({least.second, piece.box});
    load[least.first] += piece.bytes;
  }
  for (auto& pieces : plan)
    std::sort(pieces.begin(), pieces.end(), [](const PlannedPiece& a, const PlannedPiece& b) {
      return std::tie(a.held, a.box.offset) < std::tie(b.held, b.box.offset);
    });
  return plan;
}

std::string encode(const std::vector<HeldBox>& boxes) {
  std::string text;
  for (const HeldBox& h : boxes) {
    text += h.box.name + ' ' + std::to_string(static_cast<int>(h.role)) + ' ' +
            std::to_string(static_cast<int>(h.dtype)) + ' ' + std::to_string(h.box.global_shape.size());
    for (const auto* list : {&h.box.global_shape, &h.box.offset, &h.box.extent})
      for (int64_t n : *list) text += ' ' + std::to_string(n);
    text += '\n';
  }
  return text;
}

std::vector<HeldBox> decode(const std::string& text) {
  std::vector<HeldBox> boxes;
  std::istringstream in(text);
  HeldBox h;
  int role = 0, dtype = 0;
  size_t rank = 0;
  while (in >> h.box.name >> role >> dtype >> rank) {
    h.role = static_cast<Role>(role);
    h.dtype = static_cast<Dtype>(dtype);
    for (auto* list : {&h.box.global_shape, &h.box.offset, &h.box.extent}) {
      list->resize(rank);
      for (int64_t& n : *list) in >> n;
    }
    boxes.push_back(h);
  }
  return boxes;
}

}  // namespace dsa
