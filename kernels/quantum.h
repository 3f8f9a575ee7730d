// Which quantum the fixed-quantum sums of a backward pass are rounded to (sparse_mla/params.h, indexer_kl/sparse_params.h).
//
// Sums are exact, and so independent of their order, when every contribution is a multiple of a quantum and no sum passes
// 2^23 quanta. To give the same bits whatever ran before, the quantum used in the end is a function of the inputs: the power
// of 16 next above 4 * amax / 2^23, amax being the greatest magnitude of the sums. It is guessed from the call before (which
// seldom errs, amax moving slowly), and the pass is run again when the guess was wrong. The quantum is at most 16 times
// coarser than needed: an error of at most 1e-3 of a sum, on average far below bf16's own rounding.
#pragma once

#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

namespace dsa {

class QuantumGuess {
 public:
  /// pass(quantum) computes the sums from scratch and returns amax (it synchronises with the device).
  template <typename Pass>
  void run(const char* op, const Pass& pass) {
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      const int exponent = exponent_;
      const float amax = pass(std::ldexp(1.0f, exponent));
      // No finite quantum holds what is not finite; all zero needs none. Both are the same on every run.
      if (!std::isfinite(amax) || amax == 0) return;
      const int fitting = kGrid * static_cast<int>(std::ceil((std::log2(4.0 * amax) - kQuanta) / kGrid));
      if (fitting == exponent) return;
      exponent_ = fitting;
    }
    throw std::runtime_error(std::string("cannot sum the gradients of ") + op + " (no quantum fits them: they are near the edge "
                             "of fp32) look for overflow before it, or lower the learning rate");
  }

 private:
  static constexpr int kQuanta = 23, kGrid = 4, kAttempts = 8;
  std::atomic<int> exponent_{-32};
};

}  // namespace dsa
