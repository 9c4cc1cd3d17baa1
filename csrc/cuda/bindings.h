// The CUDA kernels as methods of CudaStream, named and called like their CPU twins. Also compiled into the
// emulator of tests/emulator.
#pragma once

#include <pybind11/pybind11.h>

namespace var_ext {

inline constexpr const char* cuda_kernels[] = {"adaln",
                                               "area_downsample",
                                               "bias_gelu",
                                               "bicubic_upsample",
                                               "block_causal_attention",
                                               "cached_attention",
                                               "group_norm_silu",
                                               "nearest_code",
                                               "qk_norm",
                                               "residual_quantize",
                                               "residual_step",
                                               "sample_tokens"};

void def_cuda_kernels(pybind11::module_& m);

}  // namespace var_ext
