// group_norm_silu: from the partial sums of pixel chunks per channel to values for groups and parameters, in
// an order that depends only on shapes.
#pragma once

#include "cuda/group_norm_silu_common.cuh"

namespace var_ext::cuda {

// Adds body(pair, pixels, channel) over the chunks and channels of a block's group, (b, g).
template <int N, class Body>
__device__ void sum_group(const GroupNormSiluParams& p, float (&sums)[N], float* shared, const Body& body) {
    const uint32_t width = width_of_group(p), groups = static_cast<uint32_t>(p.groups);
    const uint32_t b = blockIdx.x / groups, first = blockIdx.x % groups * width;
    const uint32_t count = static_cast<uint32_t>(p.partials) * width;
    const int64_t size = chunk_size(p);
    for (uint32_t i = threadIdx.x; i < count; i += group_norm_silu_threads) {
        const uint32_t partial = i / width, c = first + i % width;
        body(chunk_pairs(p, b, partial)[c], PixelChunk(p, partial, size).count(), c);
    }
    sum_block(sums, shared);
}

// Mean and 1 / deviation of each group, from the mean and the sum of squares around it of each channel.
// budget: registers <= 64, shared <= 256, blocks >= 4
__global__ void __launch_bounds__(group_norm_silu_threads, 4)
    group_norm_silu_stats_kernel(const GroupNormSiluParams p) {
    ptx::wait_for_previous();
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    const uint32_t width = width_of_group(p), groups = static_cast<uint32_t>(p.groups);
    const float count = static_cast<float>(width * p.pixels);
    // means relative to one of them, so that a large one costs no precision
    const float near = chunk_pairs(p, blockIdx.x / groups, 0)[blockIdx.x % groups * width].x;
    float sum[1] = {}, square[1] = {};
    sum_group(p, sum, shared, [&](float2 pair, float n, uint32_t) { sum[0] += n * (pair.x - near); });
    const float mean = near + sum[0] / count;
    sum_group(p, square, shared + 32, [&](float2 pair, float n, uint32_t) {
        square[0] += pair.y + n * (pair.x - mean) * (pair.x - mean);
    });
    const float rstd = 1.0f / sqrtf(square[0] / count + static_cast<float>(p.eps));
    if (threadIdx.x == 0) reinterpret_cast<float2*>(p.stats)[blockIdx.x] = make_float2(mean, rstd);
}

// The same for all groups of an image in each block of its map, if chunks are few: a thread combines those of
// a channel, a warp the channels of a group. In shared memory, after the channels; with barriers. `keeps`:
// whether this block stores them for backward.
__device__ inline const float2* stats_of_chunks(const GroupNormSiluParams& p, int64_t b, bool keeps) {
    const uint32_t width = width_of_group(p), partials = static_cast<uint32_t>(p.partials);
    float* const means = reinterpret_cast<float*>(ptx::shared_memory());
    float* const squares = means + p.channels;
    float2* const stats = reinterpret_cast<float2*>(squares + p.channels);
    const int64_t size = chunk_size(p);
#pragma unroll 1
    for (uint32_t c = threadIdx.x; c < p.channels; c += group_norm_silu_threads) {
        float mean = 0.0f, square = 0.0f, count = 0.0f;
#pragma unroll 4
        for (uint32_t partial = 0; partial < partials; ++partial) {
            const float2 pair = chunk_pairs(p, b, partial)[c];
            const float before = count, n = PixelChunk(p, partial, size).count(), off = pair.x - mean;
            count += n;  // of the first chunk above 0
            mean += off * (n / count);
            square += pair.y + off * off * (before * (n / count));
        }
        means[c] = mean;
        squares[c] = square;
    }
    __syncthreads();
    const uint32_t lane = threadIdx.x % 32;
    const float pixels = static_cast<float>(p.pixels), share = 1.0f / static_cast<float>(width);
#pragma unroll 1
    for (uint32_t g = threadIdx.x / 32; g < p.groups; g += group_norm_silu_threads / 32) {
        const uint32_t first = g * width;
        float sum[1] = {}, square[1] = {};
        for (uint32_t i = lane; i < width; i += 32) sum[0] += means[first + i] - means[first];
        sum_lanes(sum, 5);
        const float mean = means[first] + sum[0] * share;
        for (uint32_t i = lane; i < width; i += 32) {
            const float off = means[first + i] - mean;
            square[0] += squares[first + i] + pixels * off * off;
        }
        sum_lanes(square, 5);
        if (lane == 0) {  // mask
            const float variance = square[0] * share / pixels;
            const float2 own = make_float2(mean, 1.0f / sqrtf(variance + static_cast<float>(p.eps)));
            stats[g] = own;
            if (keeps) stats_of(p, b)[g] = own;
        }
    }
    __syncthreads();
    return stats;
}

// Means of each group that the gradient of x needs, from sums of slope * normed x and slope of each channel.
// budget: registers <= 64, shared <= 256, blocks >= 4
template <class T>
__global__ void __launch_bounds__(group_norm_silu_threads, 4)
    group_norm_silu_slopes_kernel(const GroupNormSiluParams p) {
    ptx::wait_for_previous();
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    const float count = static_cast<float>(p.channels / p.groups * p.pixels);
    float sums[2] = {};
    sum_group(p, sums, shared, [&](float2 pair, float, uint32_t c) {
        const float weight = widen(static_cast<const T*>(p.weight)[c * p.weight_stride]);
        sums[0] += weight * pair.y;
        sums[1] += weight * pair.x;
    });
    if (threadIdx.x == 0) {
        reinterpret_cast<float2*>(p.means)[blockIdx.x] = make_float2(sums[0] / count, sums[1] / count);
    }
}

// Gradients of weight and bias, from the same sums.
// budget: registers <= 32, shared <= 2048, blocks >= 3
template <class T>
__global__ void __launch_bounds__(sum_columns_threads, 3)
    group_norm_silu_add_kernel(const GroupNormSiluParams p) {
    ptx::wait_for_previous();
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
    const bool here = column < 2 * p.channels;  // mask
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    const float total = sum_columns(p.scratch + column, p.batch * p.partials, 2 * p.channels, here, shared);
    const bool adds = here && threadIdx.x < 32;  // mask
    if (!adds) return;
    void* const to = column % 2 == 0 ? p.grad_weight : p.grad_bias;
    static_cast<T*>(to)[column / 2] = narrow<T>(total);
}

}  // namespace var_ext::cuda
