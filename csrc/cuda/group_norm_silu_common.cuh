// What the kernels of group_norm_silu share: chunks of pixels, channels, the function and its slope.
#pragma once

#include "cuda/rows.cuh"
#include "ops/group_norm_silu.h"

namespace var_ext::cuda {

constexpr unsigned group_norm_silu_threads = 256;

// Chunks of pixels begin at multiples of 8; the last may be shorter, or empty.
struct PixelChunk {
    int64_t first, end;
    __device__ PixelChunk(const GroupNormSiluParams& p, int64_t partial) {
        const int64_t size = ((p.pixels + p.partials - 1) / p.partials + 7) / 8 * 8;
        first = min(partial * size, p.pixels);
        end = min(first + size, p.pixels);
    }
    __device__ float count() const { return static_cast<float>(end - first); }
};

// What a chunk leaves for each of its channels, (B, partials, C) pairs.
__device__ inline float2* chunk_pairs(const GroupNormSiluParams& p, int64_t b, int64_t partial) {
    return reinterpret_cast<float2*>(p.scratch) + (b * p.partials + partial) * p.channels;
}

struct Channel {
    float mean, rstd, weight, bias;
};
template <class T>
__device__ Channel channel_of(const GroupNormSiluParams& p, int64_t b, int64_t c) {
    const float2 stats = reinterpret_cast<const float2*>(p.stats)[b * p.groups + c / (p.channels / p.groups)];
    return {stats.x, stats.y, widen(static_cast<const T*>(p.weight)[c * p.weight_stride]),
            widen(static_cast<const T*>(p.bias)[c * p.bias_stride])};
}
// Means over a group of weight * slope and of weight * slope * normed x.
__device__ inline float2 slope_means_of(const GroupNormSiluParams& p, int64_t b, int64_t c) {
    return reinterpret_cast<const float2*>(p.means)[b * p.groups + c / (p.channels / p.groups)];
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
