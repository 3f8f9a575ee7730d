#include "data/digest.h"

#include <xxhash.h>

namespace dsa {
namespace {

std::string hex(XXH128_hash_t hash) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, hash);
  static const char* digits = "0123456789abcdef";
  std::string text;
  for (unsigned char byte : canonical.digest) {
    text += digits[byte >> 4];
    text += digits[byte & 15];
  }
  return text;
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

}  // namespace dsa
