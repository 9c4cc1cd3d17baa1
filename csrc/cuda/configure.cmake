# Decides once whether to build CUDA code, and says so. Sets cuda_sources.
set(VAR_EXT_CUDA AUTO CACHE STRING "Build CUDA code: AUTO (if nvcc is there), ON, OFF")
set_property(CACHE VAR_EXT_CUDA PROPERTY STRINGS AUTO ON OFF)
if(VAR_EXT_CUDA STREQUAL "")  # an environment variable that is there and empty chooses nothing, here and below
  set(VAR_EXT_CUDA AUTO)
endif()
if(NOT VAR_EXT_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "VAR_EXT_CUDA must be AUTO, ON or OFF, got '${VAR_EXT_CUDA}'")
endif()

set(cuda_sources "")
set(problem "")
if(VAR_EXT_CUDA STREQUAL "OFF")
  message(STATUS "var_ext: VAR_EXT_CUDA=OFF: CPU only")
  return()
endif()

# An explicit choice (CMAKE_CUDA_COMPILER, CUDACXX, CUDA_HOME) is taken as it is; otherwise PATH and the usual place.
if(CMAKE_CUDA_COMPILER)
  set(nvcc "${CMAKE_CUDA_COMPILER}")
elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
  set(nvcc "$ENV{CUDACXX}")
elseif(NOT "$ENV{CUDA_HOME}" STREQUAL "")
  set(where "in CUDA_HOME ($ENV{CUDA_HOME})")
  find_program(nvcc nvcc PATHS "$ENV{CUDA_HOME}/bin" NO_DEFAULT_PATH NO_CACHE)
else()
  set(where "on PATH or in /usr/local/cuda")
  find_program(nvcc nvcc PATHS /usr/local/cuda/bin NO_CMAKE_SYSTEM_PATH NO_CACHE)
endif()

if(NOT nvcc)
  set(problem "no nvcc ${where}")
else()
  # One compilation shows a toolkit that is broken, too old, or at odds with the host compiler.
  set(probe "${CMAKE_CURRENT_BINARY_DIR}/cuda_probe")
  file(WRITE "${probe}.cu" "#include <cuda_runtime.h>\n__global__ void kernel() {}\n")
  set(host "")
  if(NOT "$ENV{CUDAHOSTCXX}" STREQUAL "")
    set(host -ccbin "$ENV{CUDAHOSTCXX}")
  endif()
  execute_process(
    COMMAND "${nvcc}" -c -std=c++17 -arch=sm_90a ${host} "${probe}.cu" -o "${probe}.o"
    RESULT_VARIABLE status OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(NOT status EQUAL 0)
    string(STRIP "${said}" said)
    set(problem "${nvcc} cannot compile for sm_90a (${status}: ${said})")
  endif()
endif()

if(problem AND VAR_EXT_CUDA STREQUAL "ON")
  message(FATAL_ERROR
    "VAR_EXT_CUDA=ON, but ${problem}.\n"
    "Install the CUDA toolkit (12.0 or newer) and put nvcc on PATH or set CUDA_HOME or CUDACXX, "
    "or build for CPU only with VAR_EXT_CUDA=OFF.")
elseif(problem)
  message(STATUS "var_ext: VAR_EXT_CUDA=AUTO: CPU only, ${problem}")
  return()
endif()

# sm_80 is the baseline, sm_90a the chip tuned for, PTX serves newer ones: 100-real and 120-real would need CUDA 12.8, and
# save 16 s of the driver's compiling, once (README). A visible GPU changes nothing; whoever names
# CMAKE_CUDA_ARCHITECTURES gets those.
set(VAR_EXT_TARGETS 80-real 90a-real 90-virtual)
set(CMAKE_CUDA_COMPILER "${nvcc}")
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES ${VAR_EXT_TARGETS})
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # the module imports where no CUDA library is installed
enable_language(CUDA)
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
string(REPLACE ";" " " targets "${CMAKE_CUDA_ARCHITECTURES}")
add_compile_definitions(VAR_EXT_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}" VAR_EXT_CUDA_TARGETS="${targets}")
message(STATUS "var_ext: VAR_EXT_CUDA=${VAR_EXT_CUDA}: CUDA on, nvcc ${CMAKE_CUDA_COMPILER_VERSION} "
  "(${CMAKE_CUDA_COMPILER}), targets ${CMAKE_CUDA_ARCHITECTURES}")
