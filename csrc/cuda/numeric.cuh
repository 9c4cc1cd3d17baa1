// The element types of kernels, and pairs of them in a 32-bit register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"
#include "cuda/ptx.cuh"

namespace var_ext::cuda {

constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

__device__ inline float widen(float x) {
    return x;
}
__device__ inline float widen(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ inline float widen(__half x) {
    return __half2float(x);
}

template <class T>
__device__ T narrow(float x);  // to nearest, ties to even
template <>
__device__ inline float narrow<float>(float x) {
    return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half narrow<__half>(float x) {
    return __float2half_rn(x);
}

// Two elements of 16 bits, the first in the lower half.
template <class T>
__device__ uint32_t pack(float first, float second);
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}
template <>
__device__ inline uint32_t pack<__half>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

template <class T>
__device__ float2 unpack(uint32_t bits);
template <>
__device__ inline float2 unpack<__nv_bfloat16>(uint32_t bits) {
    __nv_bfloat162 pair;
    memcpy(&pair, &bits, sizeof(bits));
    return __bfloat1622float2(pair);
}
template <>
__device__ inline float2 unpack<__half>(uint32_t bits) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof(bits));
    return __half22float2(pair);
}

// x / y, rounded to nearest where T is float32, to 2 units in the last place where the result loses more.
template <class T>
__device__ float quotient(float x, float y) {
    if constexpr (sizeof(T) == 4) {
        return x / y;
    } else {
        return ptx::divide_approx(x, y);
    }
}

// Calls body(T{}) for the element type T that `dtype` names: float, __nv_bfloat16 or __half.
template <class Body>
void for_element(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::bfloat16:
            return body(__nv_bfloat16{});
        case DType::float16:
            return body(__half{});
        default:
            return body(float{});
    }
}

}  // namespace var_ext::cuda
