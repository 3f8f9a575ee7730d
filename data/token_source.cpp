#include "data/token_source.h"

#include <cstring>

#include "data/error.h"
#include "data/file.h"
#include "data/hdf5_tokens.h"
#include "data/megatron_index.h"

namespace dsa {

std::shared_ptr<TokenSource> open_token_source(const std::string& path, int64_t vocab_limit, bool check_ids) {
  std::string prefix = path;
  if (path.ends_with(".idx") || path.ends_with(".bin")) prefix.resize(path.size() - 4);
  if (path_exists(prefix + ".idx")) return std::make_shared<MegatronTokens>(prefix, vocab_limit, check_ids);
  const ReadFile file(path);
  char signature[8] = {};
  if (file.size() >= 8) file.read(0, 8, signature);
  if (std::memcmp(signature, "\x89HDF\r\n\x1a\n", 8) != 0)
    throw InputError("cannot read tokens from " + path, "it is neither an HDF5 file nor a Megatron .bin/.idx pair",
                     "make it with tools/tokenize.py");
  return std::make_shared<Hdf5Tokens>(path, vocab_limit, check_ids);
}

}  // namespace dsa
