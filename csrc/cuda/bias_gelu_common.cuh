// Shared by the bias_gelu kernels: the function, its derivative, and which thread has which elements.
//
//   0.5 u (1 + tanh(v / 2)) = u / (1 + e^-v)   with   v = 2 sqrt(2 / pi) (u + 0.044715 u^3)
#pragma once

#include "cuda/rows.cuh"
#include "ops/bias_gelu.h"

namespace var_ext::cuda {

constexpr unsigned bias_gelu_threads = 256, bias_gelu_warps = bias_gelu_threads / 32;

__device__ inline float gelu_exp_minus_v(float u, float square) {
    constexpr float slope_at_0 = 1.59576912f, cubic = 0.044715f, log2_e = 1.44269504f;
    return ptx::exp2_approx(u * (square * (-log2_e * slope_at_0 * cubic) - log2_e * slope_at_0));
}

template <class T>
__device__ float gelu(float u) {
    return quotient<T>(u, 1.0f + gelu_exp_minus_v(u, u * u));
}

// The derivative: s + u s (1 - s) dv/du with s = 1 / (1 + e^-v). Here 1 - s = e^-v s does not cancel; beyond
// 9 the derivative is 0 or 1 to all digits, and e^-v could overflow. NaN passes the comparisons.
template <class T>
__device__ float gelu_slope(float u) {
    constexpr float slope_at_0 = 1.59576912f, cubic = 0.044715f;
    u = u < -9.0f ? -9.0f : u > 9.0f ? 9.0f : u;
    const float square = u * u, e = gelu_exp_minus_v(u, square), s = quotient<T>(1.0f, 1.0f + e);
    return s + s * (u * (square * (3 * slope_at_0 * cubic) + slope_at_0)) * (e * s);
}

// A warp has N elements a lane in neighbouring columns, and every eighth row of a chunk. Blocks are numbered
// with the columns first: neighbours read neighbouring memory.
template <int N>
struct BiasGeluPlace {
    int64_t column;
    uint32_t chunk, warp;
    __device__ explicit BiasGeluPlace(uint32_t column_blocks)
        : column((static_cast<int64_t>(blockIdx.x % column_blocks) * 32 + threadIdx.x % 32) * N),
          chunk(blockIdx.x / column_blocks),
          warp(threadIdx.x / 32) {}
};

}  // namespace var_ext::cuda
