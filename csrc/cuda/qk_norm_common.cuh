// Shared by the qk_norm kernels: addresses of heads, and their norms.
#pragma once

#include <cstdint>

#include "cuda/rows.cuh"
#include "ops/qk_norm.h"

namespace var_ext::cuda {

constexpr unsigned qk_norm_threads = 256, qk_norm_warps = qk_norm_threads / 32;
constexpr float qk_norm_shortest = 1e-12f;                  // the floor that torch's normalize has
constexpr float qk_norm_max_log_scale = 4.60517018598809f;  // log 100

// One head of one token.
struct HeadAt {
    uint32_t b, l, h;
};

// Head `unit` of all B * L * H, heads last.
__device__ inline HeadAt head_at(uint32_t unit, int64_t length, int64_t heads) {
    const uint32_t token = unit / static_cast<uint32_t>(heads);
    const uint32_t b = token / static_cast<uint32_t>(length);
    return {b, token - b * static_cast<uint32_t>(length), unit - token * static_cast<uint32_t>(heads)};
}

// q, k and v of one tensor share one offset.
template <class Pointer>
__device__ int64_t offset_of(const HeadsOf<Pointer>& heads, HeadAt at) {
    return at.b * heads.b + at.l * heads.l + at.h * heads.h;
}

template <class T>
__device__ const T* elements(const ConstHeads& heads, int64_t offset) {
    return static_cast<const T*>(heads.data) + offset;
}
template <class T>
__device__ T* elements(const Heads& heads, int64_t offset) {
    return static_cast<T*>(heads.data) + offset;
}

// exp(min(log_scale, log 100)) of a head. Comparisons here and below let NaN through, as in torch.
template <class T, class Params>
__device__ float scale_of(const Params& p, uint32_t head) {
    const float log_scale = widen(static_cast<const T*>(p.log_scale)[head * p.log_scale_stride]);
    return expf(log_scale > qk_norm_max_log_scale ? qk_norm_max_log_scale : log_scale);
}

// The factor for a head with this sum of squares.
__device__ inline float factor_of(float square, float scale) {
    const float norm = sqrtf(square);
    return scale / (norm < qk_norm_shortest ? qk_norm_shortest : norm);
}

}  // namespace var_ext::cuda
