// bias_gelu backward: the gradient of x, and for the bias sums over chunks of rows, which a second kernel
// adds in order: the result depends only on shapes.
#pragma once

#include "cuda/bias_gelu_common.cuh"

namespace var_ext::cuda {

// Block (chunk, columns) leaves its sums in scratch.
// budget: registers <= 64, shared <= 8192, blocks >= 4
// sass <8>: LDG.E.128, STG.E.128
// sass <float, 4>: LDG.E.128, STG.E.128
template <class T, int N>
__global__ void __launch_bounds__(bias_gelu_threads, 4)
    bias_gelu_backward_kernel(const BiasGeluParams p, uint32_t column_blocks) {
    ptx::wait_for_previous();
    constexpr int steps = 2;  // rows in flight per lane
    const BiasGeluPlace<N> place(column_blocks);
    const bool here = place.column < p.channels;  // mask
    const T* const x = static_cast<const T*>(p.x) + place.column;
    const T* const grad = static_cast<const T*>(p.grad) + place.column;
    T* const out = static_cast<T*>(p.out) + place.column;

    float bias[N] = {}, sums[N] = {};
    if (here) widen_packed<T, N>(load_packed<T, N>(static_cast<const T*>(p.bias) + place.column), bias);
    const int64_t begin = p.rows * place.chunk / p.partials, end = p.rows * (place.chunk + 1) / p.partials;
#pragma unroll 1
    for (int64_t first = begin + place.warp; first < end; first += steps * bias_gelu_warps) {
        Packed<T, N> x_bits[steps] = {}, grad_bits[steps] = {};
        for (int i = 0; i < steps; ++i) {  // all loads before their first use
            const int64_t row = first + i * bias_gelu_warps;
            const bool inside = here && row < end;  // mask
            if (inside) {
                x_bits[i] = load_packed<T, N>(x + row * p.x_stride);
                grad_bits[i] = load_packed<T, N>(grad + row * p.grad_stride);
            }
        }
        for (int i = 0; i < steps; ++i) {
            const int64_t row = first + i * bias_gelu_warps;
            float values[N], grads[N];
            widen_packed<T, N>(x_bits[i], values);
            widen_packed<T, N>(grad_bits[i], grads);
            const bool inside = here && row < end;  // mask
            if (inside) {
                for (int j = 0; j < N; ++j) {
                    grads[j] *= gelu_slope<T>(values[j] + bias[j]);
                    sums[j] += grads[j];
                }
                store_packed<T, N>(out + row * p.channels, grads);
            }
        }
    }

    // over the warps, in order
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());  // (warps, 32 N)
    const uint32_t lane = threadIdx.x % 32;
    store_sums(shared + threadIdx.x * N, sums, lane / 4 % 2 == 1);
    __syncthreads();
    const uint32_t column = blockIdx.x % column_blocks * 32 * N + threadIdx.x;
    const bool adds = threadIdx.x < 32 * N && column < p.channels;  // mask
    if (!adds) return;
    float total = 0.0f;
    for (uint32_t w = 0; w < bias_gelu_warps; ++w) total += shared[w * 32 * N + threadIdx.x];
    p.scratch[place.chunk * p.channels + column] = total;
}

// budget: registers <= 32, shared <= 2048, blocks >= 3
template <class T>
__global__ void __launch_bounds__(sum_columns_threads, 3) bias_gelu_add_kernel(const BiasGeluParams p) {
    ptx::wait_for_previous();
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
    const bool here = column < p.channels;  // mask
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    const float total = sum_columns(p.scratch + column, p.partials, p.channels, here, shared);
    const bool adds = here && threadIdx.x < 32;  // mask
    if (adds) static_cast<T*>(p.grad_bias)[column] = narrow<T>(total);
}

}  // namespace var_ext::cuda
