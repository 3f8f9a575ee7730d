#include "data/token_dataset.h"

#include <algorithm>
#include <stdexcept>

#include "data/digest.h"
#include "data/error.h"
#include "data/splitmix64.h"

namespace dsa {

uint64_t permute(uint64_t index, uint64_t n, uint64_t seed, uint64_t epoch) {
  if (index >= n) throw std::out_of_range("permute: index " + std::to_string(index) + " of " + std::to_string(n));
  int half = 1;  // bits of a half: 4^half >= n, so fewer than four walks on average
  while (half < 32 && (uint64_t{1} << (2 * half)) < n) ++half;
  const uint64_t mask = (uint64_t{1} << half) - 1, key = splitmix64(splitmix64(seed) ^ epoch);
  do {
    uint64_t left = index >> half, right = index & mask;
    for (uint64_t round = 0; round < 6; ++round) {
      const uint64_t next = left ^ (splitmix64(key ^ splitmix64(right * 6 + round)) & mask);
      left = right;
      right = next;
    }
    index = left << half | right;
  } while (index >= n);
  return index;
}

TokenDataset::TokenDataset(std::vector<std::shared_ptr<TokenSource>> sources, int64_t sequence_length, uint64_t seed,
                           bool document_mask, HoldOut hold_out)
    : sources_(std::move(sources)), sequence_length_(sequence_length), held_out_(hold_out.count), seed_(seed),
      document_mask_(document_mask) {
  if (sources_.empty() || sequence_length < 1 || hold_out.count < 0)
    throw std::invalid_argument("a token dataset needs sources, a length and no negative hold-out");
  source_begin_.push_back(0);
  for (const auto& source : sources_) {
    total_tokens_ += source->size();
    source_begin_.push_back(total_tokens_);
    const std::string sha = source->tokenizer_sha256(), first = sources_[0]->tokenizer_sha256();
    if (!sha.empty() && !first.empty() && sha != first)
      throw InputError("cannot train on " + source->path(), "it was made with another tokenizer than " + sources_[0]->path(),
                       "tokenise both with one tokenizer");
  }
  total_samples_ = (total_tokens_ - 1) / sequence_length_;
  if (samples() < 1)
    throw InputError("cannot train on " + sources_[0]->path(),
                     std::to_string(total_tokens_) + " tokens are " + std::to_string(total_samples_) + " samples of " +
                         std::to_string(sequence_length_) + ", of which " + std::to_string(held_out_) + " are held out",
                     "give more data, a shorter sequence or a smaller hold-out");
}

int64_t TokenDataset::stream_index(int64_t global_index) const {
  if (global_index < 0) throw std::out_of_range("sample index " + std::to_string(global_index));
  const uint64_t n = static_cast<uint64_t>(samples()), i = static_cast<uint64_t>(global_index);
  return static_cast<int64_t>(permute(i % n, n, seed_, i / n));
}

Sample TokenDataset::sample(int64_t global_index) const { return read(stream_index(global_index)); }

Sample TokenDataset::held_out(int64_t i) const {
  if (i < 0 || i >= held_out_) throw std::out_of_range("held-out sample " + std::to_string(i));
  return read(samples() + i);
}

Sample TokenDataset::read(int64_t index) const {
  const int64_t T = sequence_length_, begin = index * T, end = begin + T + 1;
  Sample sample;
  sample.tokens.resize(static_cast<size_t>(T + 1));
  sample.document_start.assign(static_cast<size_t>(T), 0);
  size_t s = static_cast<size_t>(std::upper_bound(source_begin_.begin(), source_begin_.end(), begin) - source_begin_.begin() - 1);
  for (; s < sources_.size() && source_begin_[s] < end; ++s) {
    const int64_t offset = source_begin_[s], from = std::max(begin, offset), to = std::min(end, source_begin_[s + 1]);
    sources_[s]->read(from - offset, to - from, sample.tokens.data() + (from - begin));
    if (!document_mask_) continue;
    for (int64_t start : sources_[s]->document_starts(from - offset, to - offset)) {
      const int64_t at = start + offset - begin;
      if (at < T) std::fill(sample.document_start.begin() + at, sample.document_start.end(), static_cast<int32_t>(at));
    }
  }
  return sample;
}

std::string TokenDataset::tokenizer_sha256() const { return sources_.front()->tokenizer_sha256(); }

std::string TokenDataset::digest() const {
  Digest digest;
  digest.add(sequence_length_).add(held_out_).add(static_cast<int64_t>(seed_)).add(int64_t{document_mask_});
  for (const auto& source : sources_) digest.add(source->digest());
  return digest.hex();
}

}  // namespace dsa
