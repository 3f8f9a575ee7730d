// A stand-in for NCCL, built as a library of NCCL's name: its functions over MPI and host memory, as strict about the
// order of calls as a communicator opened with blocking=0 is. It says ncclInProgress until asked again, and refuses a
// call while the one before is in progress, or that belongs to a group outside of one.
#include <mpi.h>
#include <nccl.h>

#include <cstring>
#include <set>
#include <vector>

struct ncclComm {
  MPI_Comm mpi = MPI_COMM_NULL;
  int rank = 0, size = 1;
  int polls = 0;  // answers of ncclInProgress to come
  bool finalized = false;
  std::vector<MPI_Request> requests;
};

namespace {

int depth = 0;               // of ncclGroupStart
std::set<ncclComm*> busy;    // communicators of the open group

bool in_progress(ncclComm* comm) { return comm->polls > 0 || (depth == 0 && !comm->requests.empty()); }

void exchange(ncclComm* comm, const void* send, void* recv, size_t bytes, int to, int from) {
  if (from >= 0) MPI_Irecv(recv, static_cast<int>(bytes), MPI_BYTE, from, 0, comm->mpi, &comm->requests.emplace_back());
  if (to >= 0) MPI_Isend(send, static_cast<int>(bytes), MPI_BYTE, to, 0, comm->mpi, &comm->requests.emplace_back());
}

ncclResult_t close_group() {
  for (ncclComm* comm : busy) comm->polls = 2;
  const bool any = !busy.empty();
  busy.clear();
  return any ? ncclInProgress : ncclSuccess;
}

template <typename Work>
ncclResult_t call(ncclComm* comm, Work work) {
  if (!comm || comm->finalized || in_progress(comm)) return ncclInvalidUsage;
  busy.insert(comm);
  work();
  return depth > 0 ? ncclSuccess : close_group();
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static char count = 0;
  std::memset(id->internal, 0, sizeof id->internal);
  id->internal[0] = 'N';
  id->internal[1] = ++count;
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* out, int ranks, ncclUniqueId id, int rank, ncclConfig_t* config) {
  int size = 0, own = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm_rank(MPI_COMM_WORLD, &own);
  // Every rank has to bring rank 0's id.
  char first = id.internal[1];
  MPI_Bcast(&first, 1, MPI_CHAR, 0, MPI_COMM_WORLD);
  if (config->blocking != 0 || ranks != size || rank != own || id.internal[0] != 'N' || id.internal[1] != first)
    return ncclInvalidArgument;
  *out = new ncclComm;
  MPI_Comm_dup(MPI_COMM_WORLD, &(*out)->mpi);
  (*out)->rank = rank;
  (*out)->size = size;
  (*out)->polls = 3;
  return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  *state = ncclInProgress;
  if (comm->polls > 0 && --comm->polls > 0) return ncclSuccess;
  int done = 1;
  if (!comm->requests.empty())
    MPI_Testall(static_cast<int>(comm->requests.size()), comm->requests.data(), &done, MPI_STATUSES_IGNORE);
  if (!done) return ncclSuccess;
  comm->requests.clear();
  *state = ncclSuccess;
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (in_progress(comm) || comm->finalized) return ncclInvalidUsage;
  comm->finalized = true;
  comm->polls = 2;
  return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (in_progress(comm) || !comm->finalized) return ncclInvalidUsage;
  MPI_Comm_free(&comm->mpi);
  delete comm;
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
  ++depth;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  if (depth == 0) return ncclInvalidUsage;
  return --depth > 0 ? ncclSuccess : close_group();
}

ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
  if (depth == 0 || count == 0 || type != ncclInt8 || peer == comm->rank) return ncclInvalidArgument;
  return call(comm, [&] { exchange(comm, data, nullptr, count, peer, -1); });
}

ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
  if (depth == 0 || count == 0 || type != ncclInt8 || peer == comm->rank) return ncclInvalidArgument;
  return call(comm, [&] { exchange(comm, nullptr, data, count, -1, peer); });
}

ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t) {
  if (count == 0 || type != ncclInt8) return ncclInvalidArgument;
  return call(comm, [&] {
    for (int r = 0; r < comm->size; ++r) {
      char* to = static_cast<char*>(recv) + r * count;
      if (r == comm->rank) std::memcpy(to, send, count);
      else exchange(comm, send, to, count, r, r);
    }
  });
}

ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t) {
  if (count == 0 || type != ncclInt8 || send != recv) return ncclInvalidArgument;
  return call(comm, [&] {
    for (int r = 0; r < comm->size; ++r)
      if (comm->rank == root && r != root) exchange(comm, send, nullptr, count, r, -1);
    if (comm->rank != root) exchange(comm, nullptr, recv, count, -1, root);
  });
}

const char* ncclGetErrorString(ncclResult_t result) { return result == ncclInvalidUsage ? "invalid usage" : "an error"; }
const char* ncclGetLastError(ncclComm_t) { return "stand-in"; }

}  // extern "C"
