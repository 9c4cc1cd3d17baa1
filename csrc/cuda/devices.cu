#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/devices.h"

namespace var_ext {

namespace {

void check(cudaError_t status, const char* call) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("cuda_devices: ") + call + ": " + cudaGetErrorString(status));
    }
}

}  // namespace

std::vector<std::string> cuda_devices() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    // Without a GPU or with a driver older than this build there is nothing to list.
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) return {};
    check(status, "cudaGetDeviceCount");
    std::vector<std::string> devices;
    for (int i = 0; i < count; ++i) {
        cudaDeviceProp properties;
        check(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
        devices.push_back(std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
                          std::to_string(properties.minor) + ")");
    }
    return devices;
}

}  // namespace var_ext
