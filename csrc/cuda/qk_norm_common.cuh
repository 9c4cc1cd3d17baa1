// What the kernels of qk_norm share: where heads lie, their norms, and sums over lanes.
#pragma once

#include <cstdint>

#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"
#include "ops/qk_norm.h"

namespace var_ext::cuda {

constexpr unsigned qk_norm_threads = 256, qk_norm_warps = qk_norm_threads / 32;
constexpr float qk_norm_shortest = 1e-12f;                  // the floor that torch's normalize has
constexpr float qk_norm_max_log_scale = 4.60517018598809f;  // log 100

// Elements in 16 bytes: what a lane loads and stores at once.
template <class T>
constexpr int per_lane = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ void widen_16(uint4 bits, float (&to)[per_lane<T>]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    if constexpr (sizeof(T) == 4) {
        memcpy(to, words, 16);
    } else {
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack<T>(words[i]);
            to[2 * i] = pair.x;
            to[2 * i + 1] = pair.y;
        }
    }
}

template <class T>
__device__ uint4 narrow_16(const float (&from)[per_lane<T>]) {
    uint32_t words[4];
    if constexpr (sizeof(T) == 4) {
        memcpy(words, from, 16);
    } else {
        for (int i = 0; i < 4; ++i) words[i] = pack<T>(from[2 * i], from[2 * i + 1]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

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

// q, k and v of one tensor have one offset: that of any of them serves all.
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

// Adds up each of the values over 2^log_lanes neighbouring lanes; all of them get the sums.
template <int N>
__device__ void sum_lanes(float (&values)[N], int log_lanes) {
    for (int distance = (1 << log_lanes) / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffff, values[i], distance);
    }
}

// exp(min(log_scale, log 100)) of a head. Comparisons that NaN fails, here and below: it passes, as in torch.
template <class T, class Params>
__device__ float scale_of(const Params& p, uint32_t head) {
    const float log_scale = widen(static_cast<const T*>(p.log_scale)[head * p.log_scale_stride]);
    return expf(log_scale > qk_norm_max_log_scale ? qk_norm_max_log_scale : log_scale);
}

// What a head with this sum of squares is multiplied by.
__device__ inline float factor_of(float square, float scale) {
    const float norm = sqrtf(square);
    return scale / (norm < qk_norm_shortest ? qk_norm_shortest : norm);
}

}  // namespace var_ext::cuda
