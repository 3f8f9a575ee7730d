# Every library that dsatrain stands on, as imported targets:
#   dsa::torch  dsa::mpi  dsa::hdf5  protobuf::libprotobuf  nlohmann_json  CLI11  fmt  xxhash  OpenSSL::Crypto
# LibTorch is linked by its .so files, not by find_package(Torch): that one demands a CUDA toolkit
# even for a CPU program.

find_package(Threads REQUIRED)
find_package(MPI REQUIRED COMPONENTS C)
add_library(dsa_mpi INTERFACE)
target_link_libraries(dsa_mpi INTERFACE MPI::MPI_C)
target_compile_definitions(dsa_mpi INTERFACE OMPI_SKIP_MPICXX)
add_library(dsa::mpi ALIAS dsa_mpi)

find_package(HDF5 REQUIRED COMPONENTS C)
add_library(dsa_hdf5 INTERFACE)
target_include_directories(dsa_hdf5 SYSTEM INTERFACE ${HDF5_C_INCLUDE_DIRS})
target_link_libraries(dsa_hdf5 INTERFACE ${HDF5_C_LIBRARIES})
target_compile_definitions(dsa_hdf5 INTERFACE ${HDF5_C_DEFINITIONS})
add_library(dsa::hdf5 ALIAS dsa_hdf5)

find_package(Protobuf REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
find_package(fmt REQUIRED)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)  # SHA-256; libhdf5-dev brings it along

# --- CUDA (optional) ---------------------------------------------------------------------------
if(NOT DSA_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES 90a)
    enable_language(CUDA)
    set(CMAKE_CUDA_STANDARD 17)
    find_package(CUDAToolkit REQUIRED)
    set(DSA_HAVE_CUDA ON)
  elseif(DSA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "DSA_CUDA=ON but no nvcc was found (set CUDACXX or install the CUDA toolkit)")
  endif()
endif()
message(STATUS "CUDA kernels: ${DSA_HAVE_CUDA}")

# --- LibTorch ----------------------------------------------------------------------------------
if(NOT DSA_TORCH_DIR)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c
      "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE DSA_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT EXISTS ${DSA_TORCH_DIR}/lib/libtorch_cpu.so)
  message(FATAL_ERROR "LibTorch not found (looked in '${DSA_TORCH_DIR}'): run tools/setup.sh, or pass -DDSA_TORCH_DIR=<site-packages>/torch")
endif()
set(DSA_TORCH_DIR ${DSA_TORCH_DIR} CACHE PATH "the torch folder of a Python wheel")
add_library(dsa_torch INTERFACE)
target_include_directories(dsa_torch SYSTEM INTERFACE
  ${DSA_TORCH_DIR}/include ${DSA_TORCH_DIR}/include/torch/csrc/api/include)
# AT_PER_OPERATOR_HEADERS: torch's own headers then include single operators, not all of them (a third less to parse).
# FMT_HEADER_ONLY: the wheel ships fmt headers of another version than the system's library, and they come first.
target_compile_definitions(dsa_torch INTERFACE AT_PER_OPERATOR_HEADERS FMT_HEADER_ONLY=1)
# CUDA's runtime libraries lie beside torch in the wheel's site-packages.
get_filename_component(DSA_SITE_PACKAGES ${DSA_TORCH_DIR} DIRECTORY)
file(GLOB DSA_WHEEL_LIB_DIRS ${DSA_SITE_PACKAGES}/nvidia/*/lib)
foreach(dir ${DSA_TORCH_DIR}/lib ${DSA_WHEEL_LIB_DIRS})
  target_link_options(dsa_torch INTERFACE -Wl,-rpath,${dir} -Wl,-rpath-link,${dir})
endforeach()
target_link_libraries(dsa_torch INTERFACE
  ${DSA_TORCH_DIR}/lib/libtorch_cpu.so ${DSA_TORCH_DIR}/lib/libc10.so Threads::Threads)
add_library(dsa::torch ALIAS dsa_torch)

# --- NCCL (optional): connects the GPUs of several ranks ---------------------------------------
if(DSA_HAVE_CUDA)
  find_path(DSA_NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS} ${DSA_SITE_PACKAGES}/nvidia/nccl/include)
  if(NOT DSA_NCCL_INCLUDE_DIR)
    set(DSA_NCCL_INCLUDE_DIR "")
    message(STATUS "NCCL: nccl.h not found, GPU runs are of one rank")
  endif()
endif()
