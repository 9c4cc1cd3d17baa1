// qk_norm forward: every byte moves once, q, k and v of a head in the same lanes.
#pragma once

#include "cuda/qk_norm_common.cuh"

namespace var_ext::cuda {

// 16 bytes each of q, k and v of a head, in 2^log_lanes neighbouring lanes; without a `norm` only the biases.
template <class T>
__device__ void norm_lanes(uint4& q_bits, uint4& k_bits, uint4& v_bits, uint4 q_bias, uint4 v_bias, bool norm,
                           float scale, int log_lanes) {
    float q[per_lane<T>], k[per_lane<T>], v[per_lane<T>], bias[per_lane<T>];
    widen_16<T>(q_bits, q);
    widen_16<T>(k_bits, k);
    widen_16<T>(q_bias, bias);
    for (int i = 0; i < per_lane<T>; ++i) q[i] += bias[i];
    if (norm) {
        float squares[2] = {};
        for (int i = 0; i < per_lane<T>; ++i) {
            squares[0] += q[i] * q[i];
            squares[1] += k[i] * k[i];
        }
        sum_lanes(squares, log_lanes);
        const float of_q = factor_of(squares[0], scale), of_k = factor_of(squares[1], 1.0f);
        for (int i = 0; i < per_lane<T>; ++i) {
            q[i] *= of_q;
            k[i] *= of_k;
        }
    }
    widen_16<T>(v_bits, v);
    widen_16<T>(v_bias, bias);
    for (int i = 0; i < per_lane<T>; ++i) v[i] += bias[i];
    q_bits = narrow_16<T>(q);
    k_bits = narrow_16<T>(k);
    v_bits = narrow_16<T>(v);
}

// Heads of 16 * 2^log_lanes bytes that begin at multiples of 16 bytes: a lane holds 16 bytes each of q, k, v.
// budget: registers <= 40, shared <= 0, blocks >= 6
// sass: LDG.E.128, STG.E.128
template <class T>
__global__ void __launch_bounds__(qk_norm_threads, 6)
    qk_norm_aligned_kernel(const QkNormParams p, uint32_t units, int log_lanes) {
    ptx::wait_for_previous();
    const uint32_t unit = blockIdx.x * (qk_norm_threads >> log_lanes) + (threadIdx.x >> log_lanes);
    const int channel = static_cast<int>(threadIdx.x & ((1u << log_lanes) - 1)) * per_lane<T>;
    const HeadAt at = head_at(unit, p.length, p.heads);
    const bool norm = p.log_scale != nullptr;
    const bool here = unit < units;  // mask

    uint4 q = {}, k = {}, v = {}, q_bias = {}, v_bias = {};
    float scale = 1.0f;
    if (here) {  // all loads before their first use
        const int64_t offset = offset_of(p.qkv[0], at) + channel;
        q = ptx::load_16(elements<T>(p.qkv[0], offset));
        k = ptx::load_16(elements<T>(p.qkv[1], offset));
        v = ptx::load_16(elements<T>(p.qkv[2], offset));
        q_bias = ptx::load_16(elements<T>(p.q_bias, at.h * p.q_bias.h + channel));
        v_bias = ptx::load_16(elements<T>(p.v_bias, at.h * p.v_bias.h + channel));
        if (norm) scale = scale_of<T>(p, at.h);
    }

    norm_lanes<T>(q, k, v, q_bias, v_bias, norm, scale, log_lanes);
    if (here) {
        ptx::store_16(elements<T>(p.out[0], offset_of(p.out[0], at) + channel), q);
        ptx::store_16(elements<T>(p.out[1], offset_of(p.out[1], at) + channel), k);
        ptx::store_16(elements<T>(p.out[2], offset_of(p.out[2], at) + channel), v);
    }
}

// Any number of channels, any alignment: a warp per head, one element at a time, twice if there is a norm.
// budget: registers <= 40, shared <= 0, blocks >= 6
template <class T>
__global__ void __launch_bounds__(qk_norm_threads, 6)
    qk_norm_any_kernel(const QkNormParams p, uint32_t units) {
    ptx::wait_for_previous();
    const uint32_t unit = blockIdx.x * qk_norm_warps + threadIdx.x / 32;
    const bool here = unit < units;  // mask
    if (!here) return;
    const HeadAt at = head_at(unit, p.length, p.heads);
    const int lane = static_cast<int>(threadIdx.x % 32), channels = static_cast<int>(p.channels);
    const int64_t offset = offset_of(p.qkv[0], at);
    const T* const q_bias = elements<T>(p.q_bias, at.h * p.q_bias.h);

    float of_q = 1.0f, of_k = 1.0f;
    if (p.log_scale != nullptr) {
        float squares[2] = {};
        for (int c = lane; c < channels; c += 32) {
            const float u = widen(elements<T>(p.qkv[0], offset)[c]) + widen(q_bias[c]);
            const float w = widen(elements<T>(p.qkv[1], offset)[c]);
            squares[0] += u * u;
            squares[1] += w * w;
        }
        sum_lanes(squares, 5);
        of_q = factor_of(squares[0], scale_of<T>(p, at.h));
        of_k = factor_of(squares[1], 1.0f);
    }
    const T* const v_bias = elements<T>(p.v_bias, at.h * p.v_bias.h);
    T* const q = elements<T>(p.out[0], offset_of(p.out[0], at));
    T* const k = elements<T>(p.out[1], offset_of(p.out[1], at));
    T* const v = elements<T>(p.out[2], offset_of(p.out[2], at));
#pragma unroll 1
    for (int c = lane; c < channels; c += 32) {
        const float u = widen(elements<T>(p.qkv[0], offset)[c]) + widen(q_bias[c]);
        const float w = widen(elements<T>(p.qkv[1], offset)[c]);
        const float x = widen(elements<T>(p.qkv[2], offset)[c]) + widen(v_bias[c]);
        q[c] = narrow<T>(u * of_q);
        k[c] = narrow<T>(w * of_k);
        v[c] = narrow<T>(x);
    }
}

}  // namespace var_ext::cuda
