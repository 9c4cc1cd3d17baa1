// Where CUDA kernels run: a device and one of its streams, both chosen by the caller.
#pragma once

#include <cstdint>

namespace var_ext {

struct CudaStream {
    int device;
    uintptr_t handle;  // a cudaStream_t; 0 is the default stream
};

}  // namespace var_ext
