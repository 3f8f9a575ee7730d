// dsa_bench layer: its own options, LibTorch and the product's layer; see layer_bench.cpp.
#pragma once

namespace dsa::bench {

/// The arguments after `layer`. Returns the exit status.
int run_layer(int argc, char** argv);

}  // namespace dsa::bench
