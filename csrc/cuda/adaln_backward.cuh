// adaln backward: gradients of x and branch in one pass, and for a sample's vectors sums over chunks of its
// rows, which a last kernel adds in order: the result depends only on shapes.
#pragma once

#include "cuda/adaln_common.cuh"

namespace var_ext::cuda {

// Block (b, partial) leaves sums of grad_y n, grad_y and, with a residual, grad_x branch in scratch.
// budget <float>: threads <= 640, registers <= 96, shared <= 512, blocks >= 1
// budget: threads <= 320, registers <= 144, shared <= 512, blocks >= 1
// sass: LDG.E.128, STG.E.128
template <class T, bool residual>
__global__ void __launch_bounds__(adaln_most_threads<T>, 1)
    adaln_backward_aligned_kernel(const AdalnBackwardParams p) {
    ptx::wait_for_previous();
    constexpr int N = per_lane<T>, vectors = residual ? 3 : 2;
    const int64_t b = blockIdx.x / p.partials, partial = blockIdx.x % p.partials;
    const int64_t first = chunk_begin(p, partial), end = chunk_begin(p, partial + 1);
    const int64_t channel = threadIdx.x * N;
    const bool here = channel < p.channels;  // mask
    const float share = 1.0f / static_cast<float>(p.channels);
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    const uint4 scale_bits = load_row<T>(p.scale, b, 0, channel, here);
    uint4 gate_bits = {};
    if constexpr (residual) gate_bits = load_row<T>(p.gate, b, 0, channel, here);

    struct Bits {
        uint4 x = {}, grad_y = {}, branch = {};
    };
    const auto load = [&](int64_t l, bool there) {
        Bits bits;
        bits.x = load_row<T>(p.x, b, l, channel, there);
        bits.grad_y = load_row<T>(p.grad_y, b, l, channel, there);
        if constexpr (residual) {
            bits.branch = load_row<T>(p.branch, b, l, channel, there);
        }
        return bits;
    };
    float scale_sums[N] = {}, shift_sums[N] = {}, gate_sums[N] = {};
    const bool begins = here && first < end;  // mask
    Bits bits = load(first, begins);
#pragma unroll 1
    for (int64_t l = first; l < end; ++l) {
        const bool goes_on = here && l + 1 < end;  // mask
        const Bits next = load(l + 1, goes_on);
        uint4 grad_h_bits = {};  // kept until the sums are ready
        if constexpr (residual) grad_h_bits = load_row<T>(p.grad_h, b, l, channel, here);

        float h[N], grad_y[N], scale[N], sums[2] = {}, centred_sums[2] = {};
        widen_16<T>(bits.x, h);
        add_branch<T, residual>(h, bits.branch, gate_bits);
        widen_16<T>(bits.grad_y, grad_y);
        widen_16<T>(scale_bits, scale);
        for (int i = 0; i < N; ++i) {
            sums[0] += h[i];
            sums[1] += grad_y[i] * (1.0f + scale[i]);
        }
        sum_block(sums, shared);
        const float mean = sums[0] * share, grad_mean = sums[1] * share;
        for (int i = 0; i < N; ++i) {
            h[i] = here ? h[i] - mean : 0.0f;
            centred_sums[0] += h[i] * h[i];
            centred_sums[1] += h[i] * (grad_y[i] * (1.0f + scale[i]));
        }
        sum_block(centred_sums, shared + 64);
        const float rstd = 1.0f / sqrtf(centred_sums[0] * share + p.eps);
        const float grad_normed_mean = centred_sums[1] * share * rstd;

        float grad[N];
        for (int i = 0; i < N; ++i) {
            const float normed = h[i] * rstd;
            grad[i] = (grad_y[i] * (1.0f + scale[i]) - grad_mean - normed * grad_normed_mean) * rstd;
            scale_sums[i] += grad_y[i] * normed;
            shift_sums[i] += grad_y[i];
        }
        if constexpr (residual) {
            float branch[N], gate[N], grad_h[N];
            widen_16<T>(bits.branch, branch);
            widen_16<T>(grad_h_bits, grad_h);
            widen_16<T>(gate_bits, gate);
            for (int i = 0; i < N; ++i) {
                grad[i] += grad_h[i];
                gate_sums[i] += grad[i] * branch[i];
                gate[i] *= grad[i];
            }
            if (here) ptx::store_16(row_of<T>(p.grad_branch, b, l) + channel, narrow_16<T>(gate));
        }
        if (here) ptx::store_16(row_of<T>(p.grad_x, b, l) + channel, narrow_16<T>(grad));
        bits = next;
    }
    if (here) {
        float* const to = p.scratch + blockIdx.x * vectors * p.channels + channel;
        store_sums(to, scale_sums);
        store_sums(to + p.channels, shift_sums);
        if constexpr (residual) store_sums(to + 2 * p.channels, gate_sums);
    }
}

// Any number of channels, any alignment: one element at a time, cached for later passes over a row. The sums
// accumulate in scratch, where each thread has its own columns.
// budget: registers <= 80, shared <= 512, blocks >= 3
template <class T, bool residual>
__global__ void __launch_bounds__(adaln_any_threads, 3)
    adaln_backward_any_kernel(const AdalnBackwardParams p) {
    ptx::wait_for_previous();
    constexpr int vectors = residual ? 3 : 2;
    const int64_t b = blockIdx.x / p.partials, partial = blockIdx.x % p.partials;
    const float share = 1.0f / static_cast<float>(p.channels);
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    float* const to = p.scratch + blockIdx.x * vectors * p.channels;
    for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
        for (int i = 0; i < vectors; ++i) to[i * p.channels + c] = 0.0f;
    }
    const int64_t end = chunk_begin(p, partial + 1);
#pragma unroll 1
    for (int64_t l = chunk_begin(p, partial); l < end; ++l) {
        const T *const grad_y = row_of<T>(p.grad_y, b, l), *const scale = row_of<T>(p.scale, b);
        float sums[2] = {}, centred_sums[2] = {};
        for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
            sums[0] += h_of<T, residual>(p, b, l, c);
            sums[1] += widen(grad_y[c]) * (1.0f + widen(scale[c]));
        }
        sum_block(sums, shared);
        const float mean = sums[0] * share, grad_mean = sums[1] * share;
        for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
            const float centred = h_of<T, residual>(p, b, l, c) - mean;
            centred_sums[0] += centred * centred;
            centred_sums[1] += centred * (widen(grad_y[c]) * (1.0f + widen(scale[c])));
        }
        sum_block(centred_sums, shared + 64);
        const float rstd = 1.0f / sqrtf(centred_sums[0] * share + p.eps);
        const float grad_normed_mean = centred_sums[1] * share * rstd;
        for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
            const float normed = (h_of<T, residual>(p, b, l, c) - mean) * rstd, g = widen(grad_y[c]);
            float grad = (g * (1.0f + widen(scale[c])) - grad_mean - normed * grad_normed_mean) * rstd;
            to[c] += g * normed;
            to[p.channels + c] += g;
            if constexpr (residual) {
                grad += widen(row_of<T>(p.grad_h, b, l)[c]);
                to[2 * p.channels + c] += grad * widen(row_of<T>(p.branch, b, l)[c]);
                row_of<T>(p.grad_branch, b, l)[c] = narrow<T>(grad * widen(row_of<T>(p.gate, b)[c]));
            }
            row_of<T>(p.grad_x, b, l)[c] = narrow<T>(grad);
        }
    }
}

// Adds up the chunks: each block has 32 neighbouring columns of (B, vectors, C).
// budget: registers <= 32, shared <= 2048, blocks >= 3
template <class T>
__global__ void __launch_bounds__(sum_columns_threads, 3) adaln_add_kernel(const AdalnBackwardParams p) {
    ptx::wait_for_previous();
    const int64_t width = (p.gate.data == nullptr ? 2 : 3) * p.channels;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
    const int64_t b = column / width, i = column % width;
    const bool here = b < p.batch;  // mask
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    const float total = sum_columns(p.scratch + b * p.partials * width + i, p.partials, width, here, shared);
    const bool adds = here && threadIdx.x < 32;  // mask
    if (!adds) return;
    const Rows& to = i < p.channels ? p.grad_scale : i < 2 * p.channels ? p.grad_shift : p.grad_gate;
    row_of<T>(to, b)[i % p.channels] = narrow<T>(total);
}

}  // namespace var_ext::cuda
