// Which quantum the fixed-quantum sums of a backward pass are rounded to (sparse_mla/params.h, indexer_kl/sparse_params.h).
//
// Sums of integers do not depend on their order. Every contribution is rounded to a multiple of a quantum, a power of two, and
// the sums are kept as integers of 21 bits. To give the same bits whatever ran before, the quantum used in the end is a
// function of the inputs: the finest power of 16 with which no sum passes kMostQuanta. It is guessed from the call before at
// the same site (a layer and a block of its rows: gradients of different layers differ by orders of magnitude, those of one
// layer in two steps seldom by much), and the pass is run again when the guess was wrong.
// The greatest sum has 61,440 to 983,040 quanta; a sum of n contributions errs by about 0.3 sqrt(n) of them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace dsa {

/// What the end of a pass says of its sums.
struct QuantumReport {
  uint32_t most;        ///< greatest magnitude of a sum, in quanta; ~0 if some contribution was no integer of them
  uint32_t difference;  ///< of two checksums; not 0: some sum left its range, and `most` means nothing
};

class QuantumGuess {
 public:
  explicit QuantumGuess(int exponent = -32) : exponent_(exponent) {}

  static constexpr uint32_t kMostQuanta = 983'040;  // 15/16 of what 21 bits hold

  /// pass(quantum) computes the sums from scratch and returns a QuantumReport (it synchronises with the device). Afterwards
  /// the sums are those of the last pass. False if no quantum holds them: some contribution is infinite or NaN.
  template <typename Pass>
  bool run(const Pass& pass) {
    int failed = kLeast - kGrid, held = kGreatest + kGrid;  // known bounds of the finest exponent that holds
    int stride = kGrid;                                     // a site's sums grow by little, or it is its first call
    for (int exponent = exponent_;;) {
      const QuantumReport r = pass(std::ldexp(1.0f, exponent));
      if (r.difference || r.most > kMostQuanta) {
        failed = exponent;
        if (held <= kGreatest) exponent = std::min(held, exponent + std::max(kGrid, (held - exponent) / (2 * kGrid) * kGrid));
        else if (exponent < kGreatest) exponent = std::min(kGreatest, exponent + std::exchange(stride, 4 * stride));
        else break;
        continue;
      }
      // Rounding makes the greatest sums of two quanta differ a little: near the edge only a pass can tell.
      if (exponent - kGrid <= failed || r.most > kMostQuanta / kStep + kEdge) {
        exponent_ = exponent;
        return true;
      }
      held = exponent;
      exponent = std::max(failed + kGrid, exponent - finer(r.most));
    }
    return false;
  }

 private:
  static constexpr int kGrid = 4, kStep = 1 << kGrid;
  static constexpr uint32_t kEdge = 500;  // quanta, of 61,440
  static constexpr int kLeast = -136, kGreatest = 96;  // 1.5 * 2^23 quanta stay a normal number

  // By how much finer a quantum may be that makes `most` quanta the most allowed.
  static int finer(uint32_t most) {
    if (most == 0) return 6 * kGrid;
    const int bits = static_cast<int>(std::floor(std::log2(static_cast<double>(kMostQuanta) / most)));
    return std::max(bits / kGrid, 1) * kGrid;
  }

  friend class QuantumGuesses;
  std::atomic<int> exponent_;
};

/// One guess a site. Safe from several threads.
class QuantumGuesses {
 public:
  /// QuantumGuess::run with the guess of `site`; a new site begins with what held last anywhere.
  template <typename Pass>
  bool run(int64_t site, const Pass& pass) {
    QuantumGuess* guess;
    {
      const std::lock_guard lock(mutex_);
      guess = &guesses_.try_emplace(site, last_).first->second;
    }
    const bool holds = guess->run(pass);
    const std::lock_guard lock(mutex_);
    if (holds) last_ = guess->exponent_;
    return holds;
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, QuantumGuess> guesses_;
  int last_ = -32;
};

}  // namespace dsa
