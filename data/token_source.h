// One stream of token ids on disk: documents laid end to end (BOS and EOS, if any, are already in it).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dsa {

class TokenSource {
 public:
  virtual ~TokenSource() = default;

  virtual const std::string& path() const = 0;
  virtual int64_t size() const = 0;       // tokens
  virtual int64_t documents() const = 0;
  virtual void read(int64_t begin, int64_t n, int32_t* out) const = 0;
  // First tokens of the documents that start in [begin, end), strictly ascending (empty documents are not seen).
  virtual std::vector<int64_t> document_starts(int64_t begin, int64_t end) const = 0;

  virtual int64_t vocab_size() const = 0;               // every id is below; 0: the format does not say
  virtual std::string tokenizer_sha256() const = 0;     // empty: the format does not say
  virtual int64_t bos_id() const = 0;                   // -1: the format does not say
  virtual int64_t eos_id() const = 0;
  virtual std::string source() const = 0;               // where the text came from; may be empty
  // XXH3-128 (hex): sizes, attributes, all document borders and 64 windows of tokens. Not the path.
  virtual std::string digest() const = 0;
};

// By content: an HDF5 token file, or Megatron's pair (give PREFIX, PREFIX.idx or PREFIX.bin).
// vocab_limit > 0 (the model's vocabulary): refuses a file whose vocabulary is larger, and with check_ids reads
// the whole stream once and refuses any id at or above it (check a file when it is first used; later its digest
// tells). vocab_limit 0 takes the file's own word.
std::shared_ptr<TokenSource> open_token_source(const std::string& path, int64_t vocab_limit, bool check_ids);

}  // namespace dsa
