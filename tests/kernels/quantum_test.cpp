// The quantum of repeatable sums is a function of the inputs: not of the guess that a search starts from.
#include "kernels/quantum.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace dsa {
namespace {

constexpr double kHeld = 1 << 20;  // integers of 21 bits

// What a device does: contributions to one sum each, rounded and added up; beyond 21 bits the checksums differ.
QuantumReport report(const std::vector<std::vector<float>>& sums, double quantum) {
  QuantumReport r{0, 0};
  for (const auto& contributions : sums) {
    double sum = 0;
    for (const float x : contributions) {
      if (!(std::abs(x) < 4 * kHeld * quantum)) r.most = ~0u;
      else sum += std::nearbyint(x / quantum);
    }
    if (sum < -kHeld || sum >= kHeld) r.difference = 1;
    else r.most = std::max(r.most, static_cast<uint32_t>(std::abs(sum)));
  }
  return r;
}

struct Found {
  bool holds;
  double quantum;
  int passes;
};

Found find(QuantumGuess& guess, const std::vector<std::vector<float>>& sums) {
  Found f{false, 0, 0};
  f.holds = guess.run([&](float quantum) {
    f.quantum = quantum, ++f.passes;
    return report(sums, quantum);
  });
  return f;
}

std::vector<std::vector<float>> random_sums(double magnitude, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<std::vector<float>> sums(40);
  for (auto& sum : sums)
    for (int i = 0; i < 30; ++i) sum.push_back(static_cast<float>(magnitude * normal(random)));
  return sums;
}

TEST(Quantum, DependsOnTheInputsAlone) {
  for (const double magnitude : {1e-34, 3e-20, 1e-9, 0.02, 1.0, 5e8, 1e26}) {
    for (unsigned seed = 1; seed <= 20; ++seed) {
      const auto sums = random_sums(magnitude * std::pow(1.4, seed), seed);
      QuantumGuess fresh;
      const Found first = find(fresh, sums);
      ASSERT_TRUE(first.holds);
      const QuantumReport r = report(sums, first.quantum);
      EXPECT_EQ(r.difference, 0u);
      EXPECT_LE(r.most, QuantumGuess::kMostQuanta);
      const QuantumReport finer = report(sums, first.quantum / 16);
      EXPECT_TRUE(finer.difference || finer.most > QuantumGuess::kMostQuanta) << magnitude << " finer by 16 holds too: " << finer.most;
      EXPECT_LE(first.passes, 12);
      EXPECT_EQ(find(fresh, sums).passes, r.most > QuantumGuess::kMostQuanta / 16 + 500 ? 1 : 3) << "the guess is remembered";
      for (const double other : {1e-30, 1e-3, 1e20}) {
        QuantumGuess moved;
        ASSERT_TRUE(find(moved, random_sums(other, 99)).holds);
        const Found again = find(moved, sums);
        EXPECT_TRUE(again.holds);
        EXPECT_EQ(again.quantum, first.quantum) << magnitude << " after " << other;
      }
    }
  }
}

TEST(Quantum, AtTheEdgeBetweenTwo) {
  // 983,040 quanta of 1, but for a rounding: which of two holds is the same whatever the guess.
  for (const float little : {0.f, 0.3f, 0.49f, 0.51f, 1.f}) {
    const std::vector<std::vector<float>> sums{{983'039.f, little, little}};
    double found[3];
    int i = 0;
    for (const double other : {1e-30, 1.0, 1e20}) {
      QuantumGuess guess;
      ASSERT_TRUE(find(guess, random_sums(other, 5)).holds);
      ASSERT_TRUE(find(guess, sums).holds);
      found[i++] = find(guess, sums).quantum;
    }
    EXPECT_EQ(found[0], found[1]);
    EXPECT_EQ(found[0], found[2]);
  }
}

TEST(Quantum, EverySiteHasItsGuess) {
  QuantumGuesses guesses;
  const auto passes = [&](int64_t site, const std::vector<std::vector<float>>& sums) {
    int n = 0;
    double quantum = 0;
    EXPECT_TRUE(guesses.run(site, [&](float q) { return quantum = q, ++n, report(sums, q); }));
    QuantumGuess fresh;
    EXPECT_EQ(quantum, find(fresh, sums).quantum) << "site " << site;
    return n;
  };
  // Five layers whose sums differ by 1000 from one to the next. Their greatest sum has 200,000 quanta: no edge is near.
  const auto layer = [](int64_t site, float by) {
    const float quantum = std::ldexp(1.f, 12 * static_cast<int>(site) - 40);
    return std::vector<std::vector<float>>{{200'000 * by * quantum}, {10'000 * quantum, 3.3f * quantum}};
  };
  for (int step = 0; step < 3; ++step)
    for (int64_t site = 0; site < 5; ++site) {
      const int n = passes(site, layer(site, 1));
      EXPECT_LE(n, step > 0 ? 1 : 12) << "step " << step << ", site " << site;
    }
  EXPECT_LE(passes(2, layer(2, 10)), 2) << "sums grow past the quantum";
  EXPECT_EQ(passes(2, layer(2, 10)), 1);
  EXPECT_LE(passes(2, layer(2, 1)), 2) << "sums shrink";
}

TEST(Quantum, ZeroAndWhatIsNotFinite) {
  QuantumGuess guess;
  EXPECT_TRUE(find(guess, {{0.f, 0.f}, {}}).holds);
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    const Found f = find(guess, {{1.f, bad}});
    EXPECT_FALSE(f.holds);
    EXPECT_LE(f.passes, 12);
  }
  EXPECT_TRUE(find(guess, {{1.f}}).holds) << "and the next call is none the worse";
}

}  // namespace
}  // namespace dsa
