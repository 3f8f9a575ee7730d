// NCCL's functions, found when the first GPU group opens: a program built for GPUs starts without NCCL too. The types
// come from nccl.h; the library is the one that LibTorch's CUDA half has loaded.
#pragma once

#include <nccl.h>

namespace dsa {

struct NcclApi {
  decltype(&::ncclGetVersion) get_version;
  decltype(&::ncclGetUniqueId) get_unique_id;
  decltype(&::ncclCommInitRankConfig) comm_init_rank_config;
  decltype(&::ncclCommGetAsyncError) comm_get_async_error;
  decltype(&::ncclCommFinalize) comm_finalize;
  decltype(&::ncclCommDestroy) comm_destroy;
  decltype(&::ncclGroupStart) group_start;
  decltype(&::ncclGroupEnd) group_end;
  decltype(&::ncclSend) send;
  decltype(&::ncclRecv) recv;
  decltype(&::ncclAllGather) all_gather;
  decltype(&::ncclBroadcast) broadcast;
  decltype(&::ncclGetErrorString) get_error_string;
  decltype(&::ncclGetLastError) get_last_error;
};

/// Opened once. Throws std::invalid_argument when libnccl.so.2 is missing or too old.
const NcclApi& nccl_api();

}  // namespace dsa
