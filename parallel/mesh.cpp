#include "parallel/mesh.h"

#include <mpi.h>

#include <exception>
#include <stdexcept>

#include "parallel/local_communicator.h"
#include "parallel/mpi_communicator.h"
#ifdef DSA_HAVE_NCCL
#include "parallel/nccl_communicator.h"
#endif

namespace dsa {

namespace {

bool mpi_runs() {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized && !finalized;
}

std::unique_ptr<Communicator> connect(std::unique_ptr<MpiCommunicator> host, at::Device device,
                                      std::chrono::milliseconds deadline) {
  if (device.is_cpu()) return host;
#ifdef DSA_HAVE_NCCL
  return std::make_unique<NcclCommunicator>(std::move(host), device, deadline);
#else
  static_cast<void>(deadline);
  throw std::invalid_argument("cannot use several GPUs (this dsatrain was built without NCCL) build it where nccl.h is "
                              "found, or run one rank");
#endif
}

}  // namespace

MpiSession::MpiSession(int* argc, char*** argv) : exceptions_at_start_(std::uncaught_exceptions()) {
  if (mpi_runs()) throw std::runtime_error("MPI is initialised already (a second MpiSession) keep one per process");
  int provided = 0;
  // Calls come from one thread at a time, but autograd may change which.
  MPI_Init_thread(argc, argv, MPI_THREAD_SERIALIZED, &provided);
  if (provided < MPI_THREAD_SERIALIZED)
    throw std::runtime_error("this MPI cannot serve calls from changing threads (it provides thread level " +
                             std::to_string(provided) + ") use an MPI built with thread support");
}

MpiSession::~MpiSession() {
  if (!mpi_runs()) return;
  if (std::uncaught_exceptions() > exceptions_at_start_) MPI_Abort(MPI_COMM_WORLD, 70);
  MPI_Finalize();
}

int MpiSession::rank() const {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

int MpiSession::size() const {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

void MpiSession::abort(int exit_code) {
  if (mpi_runs()) MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

Mesh::Mesh(at::Device device) : layout_(Degrees{}), rank_(0), device_(device) {
  for (int axis = 0; axis < kAxisCount; ++axis)
    groups_[axis] = std::make_unique<LocalCommunicator>(name_of(static_cast<Axis>(axis)));
}

Mesh Mesh::single(at::Device device) { return Mesh(device); }

Mesh::Mesh(Degrees degrees, bool check_calls, at::Device device, std::chrono::milliseconds deadline)
    : layout_(degrees), rank_(0), device_(device) {
  int size = 1;
  if (mpi_runs()) {
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
  }
  if (size != layout_.world())
    throw std::invalid_argument("the mesh does not fit the job (data " + std::to_string(degrees.data) + " x context " +
                                std::to_string(degrees.context) + " x tensor " + std::to_string(degrees.tensor) +
                                " = " + std::to_string(layout_.world()) + " ranks, but " + std::to_string(size) +
                                " run) start it with mpirun -np " + std::to_string(layout_.world()) +
                                " or change the degrees");
  coordinates_ = layout_.of(rank_);
  for (int i = 0; i < kAxisCount; ++i) {
    const Axis axis = static_cast<Axis>(i);
    const std::vector<int> members = layout_.group(axis, rank_);
    if (members.size() == 1) {
      // All groups of an axis have the same size, so no rank waits in the split for this one.
      groups_[i] = std::make_unique<LocalCommunicator>(name_of(axis));
      continue;
    }
    MPI_Comm comm = MPI_COMM_NULL;
    MPI_Comm_split(MPI_COMM_WORLD, /*color=*/members.front(), /*key=*/rank_, &comm);
    groups_[i] = connect(std::make_unique<MpiCommunicator>(comm, name_of(axis), check_calls, kLongestMessage, deadline),
                         device, deadline);
  }
}

std::string Mesh::label() const {
  return "[rank " + std::to_string(rank_) + " tp=" + std::to_string(coordinates_.tensor) +
         " cp=" + std::to_string(coordinates_.context) + " dp=" + std::to_string(coordinates_.data) +
         " ep=" + std::to_string(coordinates_.expert) + "]";
}

}  // namespace dsa
