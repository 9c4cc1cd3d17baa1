// Launches kernels on the caller's stream and device, without a sync; errors name the op.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common/stream.h"

namespace var_ext::cuda {

inline void check(const char* op, cudaError_t status) {
    if (status == cudaSuccess) return;
    std::string message = std::string(op) + ": CUDA error: " + cudaGetErrorString(status);
    if (status == cudaErrorNoKernelImageForDevice)
        message += "; the kernels need compute capability 8.0 or newer";
    throw std::runtime_error(message);
}

// Makes a device current and restores the previous one.
class OnDevice {
  public:
    OnDevice(const char* op, int device) {
        check(op, cudaGetDevice(&before_));
        if (before_ == device) return;
        check(op, cudaSetDevice(device));
        changed_ = true;
    }
    ~OnDevice() {
        if (changed_) static_cast<void>(cudaSetDevice(before_));
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

inline int multiprocessors(const char* op, const CudaStream& where) {
    int count = 0;
    check(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, where.device));
    return count;
}

// Dynamic shared memory that a block may have: 163 KB on compute capability 8.0, 227 on 9.0 and 10.0, 99
// on 8.6, 8.9 and 12.0.
inline size_t most_shared(const char* op, const CudaStream& where) {
    int most = 0;
    check(op, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, where.device));
    return static_cast<size_t>(most);
}

// Throws where a block may not have that much.
inline void check_shared(const char* op, const CudaStream& where, size_t bytes) {
    const size_t most = most_shared(op, where);
    if (bytes <= most) return;
    throw std::runtime_error(std::string(op) + ": these sizes need " + std::to_string(bytes) +
                             " bytes of shared memory a block, and this GPU has " + std::to_string(most) +
                             "; VAR_EXT_BACKEND=reference takes any");
}

// Whether blocks may start before the previous kernel ends: they wait for it themselves. VAR_EXT_PDL=0
// disables it.
inline bool starts_early(const char* op, const CudaStream& where) {
    const char* said = std::getenv("VAR_EXT_PDL");
    if (said != nullptr && std::string(said) == "0") return false;
    int major = 0;
    check(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, where.device));
    return major >= 9;
}

// `shared_bytes` of dynamic shared memory per block. No allocation and no sync, so a CUDA graph can capture
// a launch.
template <class... Params, class... Args>
void launch(const char* op, const CudaStream& where, dim3 grid, unsigned threads, size_t shared_bytes,
            void (*kernel)(Params...), Args... args) {
    const OnDevice guard(op, where.device);
    constexpr size_t granted = 48 * 1024;  // a block gets more only on request
    if (shared_bytes > granted) {
        check_shared(op, where, shared_bytes);
        check(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shared_bytes)));
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(where.handle);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = starts_early(op, where) ? 1 : 0;
    check(op, cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace var_ext::cuda
