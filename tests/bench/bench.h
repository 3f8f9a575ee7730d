// What the benchmark suites share: cold timing, one line a measurement, and the same as JSON.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace dsa::bench {

struct Measurement {
  std::string name;     ///< operation, dtype and shape
  double milliseconds;  ///< median
  double value;         ///< in `unit`, from the formula that the suite states
  std::string unit;     ///< TFLOP/s or TB/s
  double floor;         ///< milliseconds that the measured ceilings of the device allow at best; 0: none
  double peer;          ///< best public kernel on the same kind of GPU, in `unit`; 0: none
  double goal;          ///< what this one is to reach, in `unit`; 0: none
};

class Report {
 public:
  void add(const Measurement& m);                   ///< prints its line
  void write_json(const std::string& path) const;   ///< throws when the file cannot be written

 private:
  std::vector<Measurement> measurements_;
};

/// Median milliseconds of `repeats` runs after two warm-ups, each with the L2 cache full of other (clean) data.
double cold_milliseconds(const std::function<void()>& work, int repeats);

/// Reads more memory than the L2 cache holds.
void flush_l2();

struct Options {
  bool quick = false;   ///< leave out the runs of more than 100 ms
  std::string only;     ///< names that do not contain this are left out
};

void run_dense_mla_suite(const Options& options, Report& report);
void run_indexer_suite(const Options& options, Report& report);
void run_indexer_backward_suite(const Options& options, Report& report);
void run_indexer_kl_suite(const Options& options, Report& report);
void run_topk_suite(const Options& options, Report& report);
void run_sparse_chain_suite(const Options& options, Report& report);
void run_sparse_mla_suite(const Options& options, Report& report);

}  // namespace dsa::bench
