// The CUDA kernels as methods of CudaStream, named and called like their CPU twins. Also compiled into the
// emulator of tests/emulator.
#pragma once

#include <pybind11/pybind11.h>

namespace var_ext {

void def_cuda_kernels(pybind11::module_& m);

}  // namespace var_ext
