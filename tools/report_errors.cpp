#include <c10/util/Exception.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "data/error.h"
#include "parallel/communication_failure.h"
#include "parallel/mesh.h"
#include "recipes/error.h"
#include "tools/commands.h"
#include "tools/launch.h"
#include "trainer/run_failure.h"

namespace dsa {
namespace {

// The message and exit code of the exception in flight.
std::pair<std::string, int> describe_current() {
  try {
    throw;
  } catch (const RecipeError& e) {
    return {e.what(), 2};
  } catch (const std::invalid_argument& e) {
    return {std::string("error: ") + e.what(), 2};
  } catch (const InputError& e) {
    return {std::string("error: ") + e.what(), 3};
  } catch (const RunFailure& e) {
    return {std::string("error: ") + e.what(), e.exit_code()};
  } catch (const c10::OutOfMemoryError& e) {
    return {std::string("error: the device's memory does not suffice (") + e.what_without_backtrace() +
                ") give it less at a time, or more devices", kExitOutOfMemory};
  } catch (const CommunicationFailure& e) {
    return {std::string("error: ") + e.what(), kExitCommunication};
  } catch (const std::exception& e) {
    return {std::string("internal error: ") + e.what(), 70};
  }
}

// Rank 0 speaks for all when they fail alike: its exit ends the others while they wait here. A rank that fails alone
// lives long enough to say so.
void say(int rank, const std::string& message) {
  if (rank != 0) std::this_thread::sleep_for(std::chrono::seconds(10));
  std::fprintf(stderr, rank == 0 ? "%s\n" : "[rank %2$d] %1$s\n", message.c_str(), rank);
  std::fflush(nullptr);
}

}  // namespace

int report_errors(const std::function<int()>& work) {
  try {
    return work();
  } catch (...) {
    const auto [message, code] = describe_current();
    say(launched_rank(), message);
    return code;
  }
}

int report_errors_under_mpi(int rank, const std::function<int()>& work) {
  try {
    return work();
  } catch (...) {
    const auto [message, code] = describe_current();
    say(rank, message);
    MpiSession::abort(code);
  }
}

}  // namespace dsa
