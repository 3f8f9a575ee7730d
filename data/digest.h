// XXH3-128 as 32 hex digits: names content, proves nothing against an adversary. 6.4 GiB/s a core.
// SHA-256 only where other programs recorded it: a token file names its tokenizer by the SHA-256 of tokenizer.json.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace dsa {

class Digest {
 public:
  Digest();
  ~Digest();
  Digest(const Digest&) = delete;
  Digest& operator=(const Digest&) = delete;

  Digest& add(const void* bytes, uint64_t n);
  Digest& add(const std::string& text);  // its length too, so that two texts are not one
  Digest& add(int64_t value);
  std::string hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string xxh3_128_hex(const void* bytes, uint64_t n);
std::string xxh3_128_hex(const std::string& bytes);

// 64 hex digits, as sha256sum prints them. Throws InputError when the file cannot be read.
std::string sha256_of_file(const std::string& path);

}  // namespace dsa
