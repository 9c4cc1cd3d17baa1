// The CUDA kernels as methods of CudaStream, with the names and arguments of the CPU kernels. Also compiled
// into the emulator of tests/emulator.
#pragma once

#include <pybind11/pybind11.h>

namespace var_ext {

void def_cuda_kernels(pybind11::module_& m);

}  // namespace var_ext
