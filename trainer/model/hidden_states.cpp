#include "trainer/model/hidden_states.h"

#include <ATen/ops/empty.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <exception>
#include <stdexcept>
#include <utility>

namespace dsa {

HiddenStates::HiddenStates(at::Device device)
    : device_(device),
      copies_(c10::impl::getDeviceGuardImpl(device.type())
                  ->getStreamFromGlobalPool(device, /*isHighPriority=*/false)) {}

// After an error states may be on their way: their memory is free only when they have come.
HiddenStates::~HiddenStates() try {
  for (const State& state : states_)
    if (state.arrived) state.arrived->block(current());
} catch (const std::exception&) {  // the GPU itself failed: whoever uses it next hears of it
}

c10::Stream HiddenStates::current() const { return c10::impl::getDeviceGuardImpl(device_.type())->getStream(device_); }

void HiddenStates::after_current_stream() const {
  c10::Event here(device_.type());
  here.record(current());
  here.block(copies_);
}

size_t HiddenStates::put(const at::Tensor& x) {
  const at::Tensor from = x.detach();
  State state;
  state.host = at::empty(from.sizes(), from.options().device(at::kCPU).pinned_memory(true));
  after_current_stream();
  {
    const c10::StreamGuard guard(copies_);
    state.host.copy_(from, /*non_blocking=*/true);
  }
  from.record_stream(copies_);
  states_.push_back(std::move(state));
  return states_.size() - 1;
}

void HiddenStates::fetch(State& state) {
  if (!state.host.defined()) return;  // on its way, or taken
  state.x = at::empty(state.host.sizes(), state.host.options().device(device_).pinned_memory(false));
  after_current_stream();  // whose work may have had this memory before
  {
    const c10::StreamGuard guard(copies_);
    state.x.copy_(state.host, /*non_blocking=*/true);
  }
  state.arrived = std::make_unique<c10::Event>(device_.type());
  state.arrived->record(copies_);
  state.host.reset();  // the allocator keeps pinned memory until its copies are done
}

at::Tensor HiddenStates::take(size_t number) {
  State& state = states_.at(number);
  fetch(state);
  if (!state.x.defined())
    throw std::logic_error("a hidden state was taken twice (it is kept once) this is a mistake of the program");
  state.arrived->block(current());
  state.arrived.reset();
  if (number > 0) fetch(states_[number - 1]);
  return std::exchange(state.x, {});
}

}  // namespace dsa
