// The token file of tools/tokenize.py:
//   /tokens uint32 [N];  /document_offsets int64 [D+1], first 0, last N, strictly increasing;
//   attributes format = "dsatrain.tokens", version = 1, tokenizer_sha256, vocab_size, bos_id, eos_id, source.
#pragma once

#include "data/hdf5_file.h"
#include "data/token_source.h"

namespace dsa {

class Hdf5Tokens : public TokenSource {
 public:
  // Structure and offsets are always checked; ids when check_ids. vocab_limit as in open_token_source.
  Hdf5Tokens(const std::string& path, int64_t vocab_limit, bool check_ids);

  const std::string& path() const override { return file_.path(); }
  int64_t size() const override { return size_; }
  int64_t documents() const override { return documents_; }
  void read(int64_t begin, int64_t n, int32_t* out) const override;
  std::vector<int64_t> document_starts(int64_t begin, int64_t end) const override;
  int64_t vocab_size() const override { return vocab_size_; }
  std::string tokenizer_sha256() const override { return tokenizer_sha256_; }
  int64_t bos_id() const override { return bos_id_; }
  int64_t eos_id() const override { return eos_id_; }
  std::string source() const override { return source_; }
  std::string digest() const override { return digest_; }

 private:
  Hdf5File file_;
  int64_t size_ = 0, documents_ = 0, vocab_size_ = 0, bos_id_ = -1, eos_id_ = -1;
  std::string tokenizer_sha256_, source_, digest_;
  std::vector<int64_t> every_4096th_offset_;  // an index in memory, so that billions of documents fit
};

}  // namespace dsa
