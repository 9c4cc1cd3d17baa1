// Shared by the group_norm_silu kernels: chunks of pixels, channels, the function and its derivative.
#pragma once

#include "cuda/rows.cuh"
#include "ops/group_norm_silu.h"

namespace var_ext::cuda {

constexpr unsigned group_norm_silu_threads = 256;

// Chunks of pixels begin at multiples of 8; the last may be shorter, or empty. Within one, elements are
// counted in 32 bits; where it begins takes 64.
__host__ __device__ inline int64_t chunk_size(const GroupNormSiluParams& p) {
    return ((p.pixels + p.partials - 1) / p.partials + 7) / 8 * 8;
}
struct PixelChunk {
    int64_t first;
    uint32_t pixels;
    __device__ PixelChunk(const GroupNormSiluParams& p, uint32_t partial, int64_t size)
        : first(min(partial * size, p.pixels)), pixels(static_cast<uint32_t>(min(size, p.pixels - first))) {}
    __device__ float count() const { return static_cast<float>(pixels); }
};

// The partial sums of a chunk, one pair per channel: (B, partials, C) pairs.
__device__ inline float2* chunk_pairs(const GroupNormSiluParams& p, int64_t b, uint32_t partial) {
    return reinterpret_cast<float2*>(p.scratch) + (b * p.partials + partial) * p.channels;
}

__device__ inline uint32_t width_of_group(const GroupNormSiluParams& p) {
    return static_cast<uint32_t>(p.channels) / static_cast<uint32_t>(p.groups);
}

// The bias added to a channel of x first.
template <class T>
__device__ float input_bias_of(const GroupNormSiluParams& p, uint32_t c) {
    return p.input_bias == nullptr ? 0.0f
                                   : widen(static_cast<const T*>(p.input_bias)[c * p.input_bias_stride]);
}

// `mean`: of the group, minus the channel's input bias.
struct Channel {
    float mean, rstd, weight, bias;
};
// Mean and 1 / deviation of an image's groups.
__device__ inline float2* stats_of(const GroupNormSiluParams& p, int64_t b) {
    return reinterpret_cast<float2*>(p.stats) + b * p.groups;
}
template <class T>
__device__ Channel channel_of(const GroupNormSiluParams& p, const float2* stats, uint32_t c) {
    const float2 own = stats[c / width_of_group(p)];
    return {own.x - input_bias_of<T>(p, c), own.y,
            widen(static_cast<const T*>(p.weight)[c * p.weight_stride]),
            widen(static_cast<const T*>(p.bias)[c * p.bias_stride])};
}
// Means over a group of weight * slope and of weight * slope * normed x.
__device__ inline float2 slope_means_of(const GroupNormSiluParams& p, int64_t b, uint32_t c) {
    return reinterpret_cast<const float2*>(p.means)[b * p.groups + c / width_of_group(p)];
}

__device__ inline float exp_minus(float y) {
    return ptx::exp2_approx(y * -1.44269504f);
}

template <class T>
__device__ float norm_silu(float x, const Channel& c) {
    const float y = (x - c.mean) * (c.rstd * c.weight) + c.bias;
    return quotient<T>(y, 1.0f + exp_minus(y));
}

struct Slope {
    float normed, slope;  // x before weight and bias, and the gradient of the norm's output
};
template <class T>
__device__ Slope slope_of(float x, float grad, const Channel& c) {
    const float normed = (x - c.mean) * c.rstd, any = normed * c.weight + c.bias;
    const float y = any < -80.0f ? -80.0f : any;  // there the derivative is 0, and e^-y could overflow
    const float e = exp_minus(y), sigmoid = quotient<T>(1.0f, 1.0f + e);
    // sigmoid (1 + y (1 - sigmoid)), where 1 - sigmoid = e sigmoid does not cancel
    return {normed, grad * (sigmoid + y * sigmoid * (e * sigmoid))};
}
__device__ inline float grad_x_of(const Slope& s, const Channel& c, float2 means) {
    return (s.slope * c.weight - means.x - s.normed * means.y) * c.rstd;
}

}  // namespace var_ext::cuda
