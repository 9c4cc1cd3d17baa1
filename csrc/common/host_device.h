// Marks a function that CPU kernels and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define VAR_EXT_HOST_DEVICE __host__ __device__
#else
#define VAR_EXT_HOST_DEVICE
#endif
