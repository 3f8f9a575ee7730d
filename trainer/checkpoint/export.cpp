#include "trainer/checkpoint/export.h"

#include <algorithm>
#include <filesystem>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "data/error.h"
#include "data/file.h"
#include "data/float_formats.h"
#include "data/fp8_block.h"
#include "data/hf_names.h"

namespace dsa {
namespace {

constexpr int64_t kPieceElements = int64_t{1} << 24;  // 64 MiB as float32
constexpr uint64_t kPieceBytes = uint64_t{64} << 20;

class Export {
 public:
  Export(const WeightSource& source, HfFolderWriter& writer, const ExportProgress& progress)
      : source_(source), writer_(writer), progress_(progress) {}

  void run() {
    for (const HfTensor& tensor : writer_.tensors()) {
      if (!tensor.duplicate_of.empty()) continue;  // written together with the tensor that it repeats
      const HfFolder* folder = raw_folder(tensor.name);
      if (folder) {
        copy(*folder, tensor.name);
        if (writer_.stored(tensor.name).dtype == Dtype::F8_E4M3) copy(*folder, hf_scale_name(tensor.name));
      } else {
        convert(tensor);
      }
    }
  }

 private:
  // The folder whose bytes can stay: never trained, of the target's dtype and, in FP8, with power-of-two scales.
  const HfFolder* raw_folder(const std::string& name) const {
    const HfFolder* folder = source_.raw(name);
    if (!folder || folder->stored_dtype(name) != writer_.stored(name).dtype) return nullptr;
    if (writer_.stored(name).dtype != Dtype::F8_E4M3) return folder;
    const std::string scale = hf_scale_name(name);
    if (folder->stored_dtype(scale) != Dtype::F32) return nullptr;
    std::vector<float> scales(folder->raw_bytes(scale) / sizeof(float));
    folder->read_raw(scale, 0, scales.size() * sizeof(float), scales.data());
    // Sign and mantissa zero, exponent neither zero nor all ones.
    const bool powers = std::all_of(scales.begin(), scales.end(), [](float s) {
      const uint32_t u = float_to_bits(s);
      return (u & 0x807fffffu) == 0 && u != 0 && u != 0x7f800000u;
    });
    return powers ? folder : nullptr;
  }

  void copy(const HfFolder& folder, const std::string& name) {
    const uint64_t bytes = folder.raw_bytes(name);
    buffer_.resize(std::min(bytes, kPieceBytes));
    for (uint64_t at = 0; at < bytes; at += kPieceBytes) {
      const uint64_t n = std::min(kPieceBytes, bytes - at);
      folder.read_raw(name, at, n, buffer_.data());
      writer_.write_raw(name, at, buffer_.data(), n);
      report(name);
    }
  }

  void convert(const HfTensor& tensor) {
    const bool matrix = tensor.shape.size() == 2;
    const int64_t rows = matrix ? tensor.shape[0] : 1, cols = tensor.shape.back();
    const int64_t step = std::max<int64_t>(1, kPieceElements / cols / kFp8Block) * kFp8Block;
    rows_.resize(static_cast<size_t>(std::min(rows, step) * cols));
    for (int64_t row = 0; row < rows; row += step) {
      const int64_t n = std::min(step, rows - row);
      ShardSpec piece = whole(tensor.name, tensor.shape);
      if (matrix) {
        piece.offset[0] = row;
        piece.extent[0] = n;
      }
      source_.read(piece, Dtype::F32, rows_.data());
      writer_.write(tensor.name, rows_.data(), row, n);
      report(tensor.name);
    }
  }

  void report(const std::string& name) const {
    if (progress_) progress_(writer_.written_bytes(), writer_.total_bytes(), name);
  }

  const WeightSource& source_;
  HfFolderWriter& writer_;
  const ExportProgress& progress_;
  std::vector<char> buffer_;
  std::vector<float> rows_;
};

// Every tensor of the target must be there in its shape, before a byte is written.
void check_source(const WeightSource& source, HfFormat format) {
  std::vector<std::string> problems;
  for (const HfTensor& tensor : hf_tensors(source.config(), format)) {
    if (!tensor.duplicate_of.empty()) continue;
    if (!source.has(tensor.name))
      problems.push_back(tensor.name + " is missing");
    else if (source.shape(tensor.name) != tensor.shape)
      problems.push_back(fmt::format("{} is [{}] instead of [{}]", tensor.name,
                                     fmt::join(source.shape(tensor.name), ", "), fmt::join(tensor.shape, ", ")));
  }
  if (problems.empty()) return;
  const size_t shown = std::min<size_t>(problems.size(), 10);
  std::string text = fmt::format("{}", fmt::join(problems.begin(), problems.begin() + shown, "; "));
  if (problems.size() > shown) text += fmt::format("; and {} more", problems.size() - shown);
  throw InputError("cannot export " + source.path(), text, "check that its config.json describes these tensors");
}

bool has_indexer(const WeightSource& source) {
  return source.config().indexer && source.has("model.layers.0.self_attn.indexer.wq_b.weight");
}

}  // namespace

void export_checkpoint(const WeightSource& source, const std::string& folder, const ExportOptions& options,
                       const ExportProgress& progress) {
  if (path_exists(folder) && !(std::filesystem::is_directory(folder) && std::filesystem::is_empty(folder)))
    throw InputError("cannot write the model folder " + folder, "it exists already and is not empty",
                     "choose another name or remove that folder first");
  const HfFormat format = options.format.value_or(has_indexer(source) ? HfFormat::V32 : HfFormat::V31);
  if (format == HfFormat::V32 && !has_indexer(source))
    throw InputError("cannot export " + source.path() + " as v3.2", "it has no indexer",
                     "run the warm-up stage first, or export it as v3.1");
  check_source(source, format);
  HfFolderWriter writer(folder, source.config(), format, options.dtype, options.max_shard_bytes);
  Export(source, writer, progress).run();
  if (!source.hf_folder().empty()) writer.copy_tokenizer_files(source.hf_folder());
  writer.commit();
}

}  // namespace dsa
