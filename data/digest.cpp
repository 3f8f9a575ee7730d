#include "data/digest.h"

#include <openssl/evp.h>
#include <xxhash.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "data/file.h"

namespace dsa {
namespace {

std::string hex(const unsigned char* bytes, size_t n) {
  static const char* digits = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < n; ++i) {
    text += digits[bytes[i] >> 4];
    text += digits[bytes[i] & 15];
  }
  return text;
}

std::string hex(XXH128_hash_t hash) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  return hex(canonical.digest, sizeof canonical.digest);
}

}  // namespace

struct Digest::State {
  XXH3_state_t* xxh = XXH3_createState();
  ~State() { XXH3_freeState(xxh); }
};

Digest::Digest() : state_(std::make_unique<State>()) { XXH3_128bits_reset(state_->xxh); }
Digest::~Digest() = default;

Digest& Digest::add(const void* bytes, uint64_t n) {
  XXH3_128bits_update(state_->xxh, bytes, n);
  return *this;
}

Digest& Digest::add(const std::string& text) {
  add(static_cast<int64_t>(text.size()));
  return add(text.data(), text.size());
}

Digest& Digest::add(int64_t value) { return add(&value, sizeof value); }

std::string Digest::hex() const { return dsa::hex(XXH3_128bits_digest(state_->xxh)); }

std::string xxh3_128_hex(const void* bytes, uint64_t n) { return hex(XXH3_128bits(bytes, n)); }

std::string xxh3_128_hex(const std::string& bytes) { return xxh3_128_hex(bytes.data(), bytes.size()); }

std::string sha256_of_file(const std::string& path) {
  const ReadFile file(path);
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  bool good = context && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1;
  std::vector<char> piece(1 << 20);
  for (uint64_t at = 0; good && at < file.size(); at += piece.size()) {
    const uint64_t n = std::min<uint64_t>(piece.size(), file.size() - at);
    file.read(at, n, piece.data());
    good = EVP_DigestUpdate(context.get(), piece.data(), n) == 1;
  }
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int bytes = 0;
  good = good && EVP_DigestFinal_ex(context.get(), digest, &bytes) == 1;
  if (!good) throw std::runtime_error("libcrypto cannot compute a SHA-256");
  return hex(digest, bytes);
}

}  // namespace dsa
