// What kernels and launchers use of the CUDA runtime, on the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)
#define __grid_constant__

#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

using std::max;
using std::min;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// threadIdx.x and so on: each conversion asks the machine whose turn it is.
namespace emulator {
template <Triple (*ask)(), unsigned Triple::* member>
struct Component {
    operator unsigned() const { return ask().*member; }
};
template <Triple (*ask)()>
struct Builtin {
    Component<ask, &Triple::x> x;
    Component<ask, &Triple::y> y;
    Component<ask, &Triple::z> z;
};
}  // namespace emulator
inline constexpr emulator::Builtin<emulator::thread_index> threadIdx{};
inline constexpr emulator::Builtin<emulator::block_index> blockIdx{};
inline constexpr emulator::Builtin<emulator::block_size> blockDim{};
inline constexpr emulator::Builtin<emulator::grid_size> gridDim{};

inline void __syncthreads(EMULATOR_SITE) {
    emulator::block_barrier({file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffff, EMULATOR_SITE) {
    emulator::warp_barrier(mask, {file, line});
}

namespace emulator {
template <class T>
T shuffled(const char* name, unsigned mask, T value, unsigned source, Site site) {
    static_assert(sizeof(T) <= 8);
    Shuffle lane = {0, source};
    memcpy(&lane.bits, &value, sizeof(T));
    warp_collective(name, mask, site, &lane, shuffle);
    memcpy(&value, &lane.bits, sizeof(T));
    return value;
}
inline unsigned voted(const char* name, unsigned mask, bool mine, Site site) {
    Vote lane = {mine, 0};
    warp_collective(name, mask, site, &lane, vote);
    return lane.ballot;
}
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::lane_index(), first = lane / width * width;
    return emulator::shuffled("__shfl_sync", mask, value, first + (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::lane_index(), source = lane ^ bits;
    const bool inside = source / width <= lane / width;
    return emulator::shuffled("__shfl_xor_sync", mask, value, inside ? source : lane, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::lane_index(), source = lane + static_cast<int>(delta);
    const bool inside = source / width == lane / width;
    return emulator::shuffled("__shfl_down_sync", mask, value, inside ? source : lane, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
    const int lane = emulator::lane_index(), source = lane - static_cast<int>(delta);
    const bool inside = source >= lane / width * width;
    return emulator::shuffled("__shfl_up_sync", mask, value, inside ? source : lane, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, bool mine, EMULATOR_SITE) {
    return emulator::voted("__ballot_sync", mask, mine, {file, line});
}
inline bool __any_sync(unsigned mask, bool mine, EMULATOR_SITE) {
    return emulator::voted("__any_sync", mask, mine, {file, line}) != 0;
}
inline bool __all_sync(unsigned mask, bool mine, EMULATOR_SITE) {
    return emulator::voted("__all_sync", mask, mine, {file, line}) == 0xffffffff;
}

template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicAdd(T* address, T value) {
    emulator::before_atomic(address, sizeof(T), __builtin_return_address(0));
    const T before = *address;
    *address = before + value;
    return before;
}

inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
inline float __fdividef(float x, float y) {
    return x / y;
}
inline float __fmaf_rn(float x, float y, float z) {
    return std::fmaf(x, y, z);
}
// volatile: g++ may not fuse what nvcc must not
inline float __fadd_rn(float x, float y) {
    const volatile float sum = x + y;
    return sum;
}
inline float __fmul_rn(float x, float y) {
    const volatile float product = x * y;
    return product;
}
inline double __dadd_rn(double x, double y) {
    const volatile double sum = x + y;
    return sum;
}
inline double __dmul_rn(double x, double y) {
    const volatile double product = x * y;
    return product;
}
inline double __fma_rn(double x, double y, double z) {
    return std::fma(x, y, z);
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

// The host's side.
enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidValue,
    cudaErrorInvalidConfiguration,
    cudaErrorNoKernelImageForDevice
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess             ? "no error"
           : error == cudaErrorInvalidValue ? "invalid argument"
                                            : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::multiprocessors()
                                                         : static_cast<int>(emulator::shared_bytes_of_chip());
    return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > emulator::shared_bytes_of_chip())
        return cudaErrorInvalidValue;
    emulator::grant_shared_memory(kernel, static_cast<size_t>(bytes));
    return cudaSuccess;
}

// Arguments are copied into each thread, as a kernel's parameters are.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
    auto call = [&]() __attribute__((no_sanitize("thread"))) { kernel(args...); };
    const auto triple = [](dim3 d) { return emulator::Triple{d.x, d.y, d.z}; };
    const emulator::Launch launch = {triple(config->gridDim), triple(config->blockDim),
                                     config->dynamicSmemBytes, reinterpret_cast<const void*>(kernel)};
    const auto enter = [](void* closure) __attribute__((no_sanitize("thread"))) {
        (*static_cast<decltype(call)*>(closure))();
    };
    return emulator::launch(launch, enter, &call) ? cudaSuccess : cudaErrorInvalidConfiguration;
}
