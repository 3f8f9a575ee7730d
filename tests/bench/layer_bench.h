// dsa_bench layer and dsa_bench step: their own options, LibTorch and the product's layer or trainer.
#pragma once

namespace dsa::bench {

/// The arguments after `layer`: layer_bench.cpp. Returns the exit status.
int run_layer(int argc, char** argv);
/// The arguments after `step`: train_step_bench.cpp. Returns the exit status.
int run_train_step(int argc, char** argv);

}  // namespace dsa::bench
