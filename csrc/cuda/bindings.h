// The CUDA kernels as methods of CudaStream, named and called like their CPU twins. Also compiled into the
// emulator of tests/emulator.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

namespace var_ext {

inline constexpr const char* cuda_kernels[] = {
    "adaln", "bias_gelu", "block_causal_attention", "cached_attention", "group_norm_silu", "qk_norm"};

void def_cuda_kernels(pybind11::module_& m);

}  // namespace var_ext
