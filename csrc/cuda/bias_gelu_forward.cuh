// bias_gelu forward: every byte moves once.
#pragma once

#include "cuda/bias_gelu_common.cuh"

namespace var_ext::cuda {

constexpr int bias_gelu_steps = 4;                                       // rows in flight per lane
constexpr uint32_t bias_gelu_chunk = bias_gelu_steps * bias_gelu_warps;  // rows of a block

// N: elements in 16 bytes, or 1 where rows are not aligned.
// budget: registers <= 64, shared <= 0, blocks >= 4
// sass <8>: LDG.E.128, STG.E.128
// sass <float, 4>: LDG.E.128, STG.E.128
template <class T, int N>
__global__ void __launch_bounds__(bias_gelu_threads, 4)
    bias_gelu_kernel(const BiasGeluParams p, uint32_t column_blocks) {
    ptx::wait_for_previous();
    const BiasGeluPlace<N> place(column_blocks);
    const int64_t first = static_cast<int64_t>(place.chunk) * bias_gelu_chunk + place.warp;
    const bool here = place.column < p.channels;  // mask
    if (!here) return;
    const T* const x = static_cast<const T*>(p.x) + place.column;
    T* const out = static_cast<T*>(p.out) + place.column;

    float bias[N];
    widen_packed<T, N>(load_packed<T, N>(static_cast<const T*>(p.bias) + place.column), bias);
    Packed<T, N> bits[bias_gelu_steps] = {};
    for (int i = 0; i < bias_gelu_steps; ++i) {  // all loads before their first use
        const int64_t row = first + i * bias_gelu_warps;
        const bool inside = row < p.rows;  // mask
        if (inside) bits[i] = load_packed<T, N>(x + row * p.x_stride);
    }
    for (int i = 0; i < bias_gelu_steps; ++i) {
        const int64_t row = first + i * bias_gelu_warps;
        float values[N];
        widen_packed<T, N>(bits[i], values);
        for (int j = 0; j < N; ++j) values[j] = gelu<T>(values[j] + bias[j]);
        const bool inside = row < p.rows;  // mask
        if (inside) store_packed<T, N>(out + row * p.channels, values);
    }
}

}  // namespace var_ext::cuda
