// usage: mpirun -np 1 nccl_probe [lost]. A collective over stand-ins whose events never come to pass, as when the GPU waits
// for a lost rank while the host waits for the GPU: the watching thread has to end the process with exit code 71.
#include <chrono>
#include <cstring>
#include <thread>

#include "parallel/mesh.h"
#include "parallel/nccl_communicator.h"
#include "tests/parallel/nccl_standin.h"
#include "tests/parallel/tensors.h"

int main(int argc, char** argv) {
  dsa::MpiSession session(&argc, &argv);
  auto& streams = dsa::test::stand_in_for_gpus(DSA_NCCL_STANDIN);
  streams.never_done = argc > 1 && !std::strcmp(argv[1], "lost");
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &comm);
  dsa::NcclCommunicator group(std::make_unique<dsa::MpiCommunicator>(comm, "test"), at::kCPU, std::chrono::seconds(1));
  group.all_reduce(dsa::test::filled({4}, at::kFloat, 1));
  std::this_thread::sleep_for(std::chrono::seconds(4));  // the host, waiting for the GPU
  return 0;
}
