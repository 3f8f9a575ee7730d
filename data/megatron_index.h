// Megatron-LM's indexed dataset, PREFIX.idx and PREFIX.bin, little-endian:
//   idx: "MMIDIDX\0\0" | u64 version 1 | u8 dtype code | u64 S sequences | u64 D+1 document entries
//        | i32 sequence_length[S] | i64 byte_pointer[S] | i64 document_index[D+1]  (in sequences; first 0, last S)
//   bin: the ids; codes 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16: integer types alone are tokens.
// Sequences are read in their order, so byte_pointer must be their running sum.
#pragma once

#include "data/file.h"
#include "data/token_source.h"

namespace dsa {

class MegatronTokens : public TokenSource {
 public:
  MegatronTokens(const std::string& prefix, int64_t vocab_limit, bool check_ids);

  const std::string& path() const override { return prefix_; }
  int64_t size() const override { return size_; }
  int64_t documents() const override { return documents_; }
  void read(int64_t begin, int64_t n, int32_t* out) const override;
  std::vector<int64_t> document_starts(int64_t begin, int64_t end) const override;
  int64_t vocab_size() const override { return 0; }
  std::string tokenizer_sha256() const override { return ""; }
  int64_t bos_id() const override { return -1; }
  int64_t eos_id() const override { return -1; }
  std::string source() const override { return ""; }
  std::string digest() const override { return digest_; }

 private:
  std::string prefix_;
  ReadFile bin_;
  int dtype_code_ = 0, item_bytes_ = 0;
  int64_t size_ = 0, documents_ = 0;
  std::vector<int64_t> starts_;  // of the documents that are not empty
  std::string digest_;
};

}  // namespace dsa
