// usage: mpirun -np 2 session_probe finish|throw|abort. One rank leaves while the other waits in a barrier; the exit
// code of mpirun tells whether the waiting rank was released, and with what.
#include <mpi.h>

#include <stdexcept>
#include <string>

#include "parallel/mesh.h"

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "finish";
  try {
    dsa::MpiSession session(&argc, &argv);
    const dsa::Mesh mesh({.data = session.size()});
    if (session.rank() == 1 && mode == "throw") throw std::runtime_error("one rank fails");
    if (session.rank() == 1 && mode == "abort") dsa::MpiSession::abort(3);
    mesh.along(dsa::Axis::WORLD).barrier();
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
