// adaln forward: every byte moves once. The mean comes first, then the squared deviations, so that a
// large mean costs no precision.
#pragma once

#include "cuda/adaln_common.cuh"

namespace var_ext::cuda {

// Rows that begin at multiples of 16 bytes and fit into a block: it takes `rows` of a sample one by
// one, prefetching the next, and keeps scale, shift and gate.
// Three blocks fit where T has 16 bits, with half the threads.
// budget <float>: threads <= 640, registers <= 64, shared <= 256, blocks >= 1
// budget: threads <= 320, registers <= 64, shared <= 256, blocks >= 3
// sass: LDG.E.128, STG.E.128
template <class T, bool residual>
__global__ void __launch_bounds__(adaln_most_threads<T>, sizeof(T) == 4 ? 1 : 3)
    adaln_aligned_kernel(const AdalnParams p, uint32_t chunks, uint32_t rows) {
    ptx::wait_for_previous();
    constexpr int N = per_lane<T>;
    const int64_t b = blockIdx.x / chunks, first = static_cast<int64_t>(blockIdx.x % chunks) * rows;
    const int64_t end = min(first + rows, p.length), channel = threadIdx.x * N;
    const bool here = channel < p.channels;  // mask
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    const uint4 scale_bits = load_row<T>(p.scale, b, 0, channel, here);
    const uint4 shift_bits = load_row<T>(p.shift, b, 0, channel, here);
    uint4 gate_bits = {}, branch_bits = {}, next_branch_bits = {};
    if constexpr (residual) gate_bits = load_row<T>(p.gate, b, 0, channel, here);

    uint4 x_bits = load_row<T>(p.x, b, first, channel, here), next_x_bits = {};
    if constexpr (residual) branch_bits = load_row<T>(p.branch, b, first, channel, here);
#pragma unroll 1
    for (int64_t l = first; l < end; ++l) {
        const bool goes_on = here && l + 1 < end;  // mask
        next_x_bits = load_row<T>(p.x, b, l + 1, channel, goes_on);
        if constexpr (residual) next_branch_bits = load_row<T>(p.branch, b, l + 1, channel, goes_on);

        float h[N], sum[1] = {}, square[1] = {};
        widen_16<T>(x_bits, h);
        add_branch<T, residual>(h, branch_bits, gate_bits);
        if constexpr (residual) {
            if (here) ptx::store_16(row_of<T>(p.h, b, l) + channel, narrow_16<T>(h));
        }
        for (int i = 0; i < N; ++i) sum[0] += h[i];
        sum_block(sum, shared);
        const float mean = sum[0] / static_cast<float>(p.channels);
        for (int i = 0; i < N; ++i) {
            h[i] = here ? h[i] - mean : 0.0f;
            square[0] += h[i] * h[i];
        }
        sum_block(square, shared + 32);
        const float rstd = 1.0f / sqrtf(square[0] / static_cast<float>(p.channels) + p.eps);

        float scale[N], shift[N];
        widen_16<T>(scale_bits, scale);
        widen_16<T>(shift_bits, shift);
        for (int i = 0; i < N; ++i) h[i] = h[i] * rstd * (1.0f + scale[i]) + shift[i];
        if (here) ptx::store_16(row_of<T>(p.y, b, l) + channel, narrow_16<T>(h));
        x_bits = next_x_bits;
        branch_bits = next_branch_bits;
    }
}

// Any number of channels, any alignment: a block per row, one element at a time, cached for later passes.
// budget: registers <= 80, shared <= 256, blocks >= 3
template <class T, bool residual>
__global__ void __launch_bounds__(adaln_any_threads, 3) adaln_any_kernel(const AdalnParams p) {
    ptx::wait_for_previous();
    const int64_t b = blockIdx.x / p.length, l = blockIdx.x % p.length;
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    float sum[1] = {}, square[1] = {};
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
        const float h = h_of<T, residual>(p, b, l, c);
        sum[0] += h;
        if constexpr (residual) row_of<T>(p.h, b, l)[c] = narrow<T>(h);
    }
    sum_block(sum, shared);
    const float mean = sum[0] / static_cast<float>(p.channels);
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
        const float centred = h_of<T, residual>(p, b, l, c) - mean;
        square[0] += centred * centred;
    }
    sum_block(square, shared + 32);
    const float rstd = 1.0f / sqrtf(square[0] / static_cast<float>(p.channels) + p.eps);
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
        const float normed = (h_of<T, residual>(p, b, l, c) - mean) * rstd;
        const float y = normed * (1.0f + widen(row_of<T>(p.scale, b)[c])) + widen(row_of<T>(p.shift, b)[c]);
        row_of<T>(p.y, b, l)[c] = narrow<T>(y);
    }
}

}  // namespace var_ext::cuda
