// Where recomputed layers leave their inputs between the forward and the backward pass, when those are not to take the
// device's memory: pinned host memory. Copies run on a stream of their own, beside the layers: out while the layer runs
// forward, back while the layer after it runs backward. The host waits for none of them. No bit changes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <memory>
#include <vector>

namespace dsa {

class HiddenStates {
 public:
  // device: a GPU.
  explicit HiddenStates(at::Device device);
  ~HiddenStates();
  HiddenStates(const HiddenStates&) = delete;
  HiddenStates& operator=(const HiddenStates&) = delete;

  // Takes over x, of any shape and dtype, and returns its number: 0, 1, 2, ... x's memory is free once it is copied.
  size_t put(const at::Tensor& x);
  // x again, on the device, for the current stream's work from here on; once. Starts to fetch the one before it.
  at::Tensor take(size_t number);

 private:
  struct State {
    at::Tensor host, x;                    // neither: taken
    std::unique_ptr<c10::Event> arrived;   // of x
  };
  void fetch(State& state);
  void after_current_stream() const;  // what is copied next follows the current stream's work so far
  c10::Stream current() const;

  at::Device device_;
  c10::Stream copies_;
  std::vector<State> states_;
};

}  // namespace dsa
