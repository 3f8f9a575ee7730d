#include "parallel/nccl_api.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace dsa {

const NcclApi& nccl_api() {
  static const NcclApi api = [] {
    void* library = dlopen("libnccl.so.2", RTLD_NOW);
    if (!library)
      throw std::invalid_argument(std::string("cannot use several GPUs (NCCL does not load: ") + dlerror() +
                                  ") install it with tools/setup.sh --cuda, or run one rank");
    NcclApi found = {};
    const auto find = [&](auto& function, const char* symbol) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol));
      if (!function)
        throw std::invalid_argument(std::string("cannot use several GPUs (this NCCL has no ") + symbol +
                                    ") use NCCL 2.18 or newer");
    };
    find(found.get_version, "ncclGetVersion");
    find(found.get_unique_id, "ncclGetUniqueId");
    find(found.comm_init_rank_config, "ncclCommInitRankConfig");
    find(found.comm_get_async_error, "ncclCommGetAsyncError");
    find(found.comm_finalize, "ncclCommFinalize");
    find(found.comm_destroy, "ncclCommDestroy");
    find(found.group_start, "ncclGroupStart");
    find(found.group_end, "ncclGroupEnd");
    find(found.send, "ncclSend");
    find(found.recv, "ncclRecv");
    find(found.all_gather, "ncclAllGather");
    find(found.broadcast, "ncclBroadcast");
    find(found.get_error_string, "ncclGetErrorString");
    find(found.get_last_error, "ncclGetLastError");
    return found;
  }();
  return api;
}

}  // namespace dsa
