// A small HDF5 token file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/hdf5_file.h"
#include "tests/data/temp_folder.h"

namespace dsa::testing_support {

inline void write_token_file(const std::string& path, const std::vector<uint32_t>& ids, const std::vector<int64_t>& offsets,
                             const std::string& format = "dsatrain.tokens", const std::string& tokenizer = "abc") {
  auto file = Hdf5File::create(path);
  file.write_dataset("tokens", Dtype::U32, {static_cast<int64_t>(ids.size())}, ids.data());
  file.write_dataset("document_offsets", Dtype::I64, {static_cast<int64_t>(offsets.size())}, offsets.data());
  file.set_attribute("format", format);
  file.set_attribute("version", int64_t{1});
  file.set_attribute("tokenizer_sha256", tokenizer);
  file.set_attribute("vocab_size", int64_t{258});
  file.set_attribute("bos_id", int64_t{256});
  file.set_attribute("eos_id", int64_t{257});
  file.set_attribute("source", std::string("a test"));
  file.close();
}

}  // namespace dsa::testing_support
