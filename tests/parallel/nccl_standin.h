// The NCCL communicator without GPUs: tensors of the host as its device's, a stand-in for the NCCL library
// (nccl_standin.cpp), and streams and events that write down what is asked of them.
#pragma once

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

namespace dsa::test {

class StandinStreams final : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CPU> {
 public:
  mutable std::vector<std::string> log;  // "record 1 on 0", "stream 1 waits for 1", "enqueue on 1"
  std::atomic<bool> never_done = false;  // events of the communicator's stream stay open, as when a rank is lost

  c10::Stream getStreamFromGlobalPool(c10::Device device, bool high_priority) const override {
    if (!high_priority) throw std::logic_error("a communicator's stream has high priority");
    return c10::Stream(c10::Stream::UNSAFE, device, 1);
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    log.push_back("enqueue on " + std::to_string(stream.id()));
    return nullptr;
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new int64_t(0);
    *static_cast<int64_t*>(*event) = ++recorded_;
    log.push_back("record " + std::to_string(recorded_) + " on " + std::to_string(stream.id()));
  }
  void block(void* event, const c10::Stream& stream) const override {
    log.push_back("stream " + std::to_string(stream.id()) + " waits for " + std::to_string(*static_cast<int64_t*>(event)));
  }
  bool queryEvent(void*) const override { return !never_done; }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<int64_t*>(event); }

 private:
  mutable int64_t recorded_ = 0;
};

/// Puts the stand-ins in place, once, before the first NcclCommunicator of the process.
inline StandinStreams& stand_in_for_gpus(const char* library) {
  static StandinStreams* streams = [&] {
    // Loaded under NCCL's name: whoever opens libnccl.so.2 from now on gets it.
    if (!dlopen(library, RTLD_NOW)) throw std::runtime_error(dlerror());
    auto* made = new StandinStreams;
    c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CPU)].store(made);
    return made;
  }();
  return *streams;
}

}  // namespace dsa::test
