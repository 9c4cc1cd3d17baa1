// qk_norm backward: gradients of qkv, and sums over tokens for the biases and log_scale. A warp or a block
// sums a chunk of the tokens, a second kernel the chunks in order: the result depends only on
// shapes.
#pragma once

#include "cuda/qk_norm_common.cuh"

namespace var_ext::cuda {

// The gradient of a head is grad * of_grad - head * of_head; `dot` is grad . out, what log_scale gets.
struct HeadGradient {
    float of_grad = 1.0f, of_head = 0.0f, dot = 0.0f;
};
// From |head|^2 and grad . head.
__device__ inline HeadGradient head_gradient(const float (&sums)[2], float scale) {
    const float length = sqrtf(sums[0]);
    const bool is_short = length < qk_norm_shortest;  // then the norm is constant
    const float norm = is_short ? qk_norm_shortest : length;
    HeadGradient result;
    result.of_grad = scale / norm;
    result.dot = sums[1] * result.of_grad;
    result.of_head = is_short ? 0.0f : result.dot / (norm * norm);
    return result;
}

__device__ inline uint32_t chunk_begin(const QkNormBackwardParams& p, uint32_t partial) {
    return static_cast<uint32_t>(p.batch * p.length * partial / p.partials);
}

// Turns a lane's part of a gradient into that of the head before its norm; returns grad . out.
template <int N>
__device__ float unnormalize(float (&grad)[N], const float (&head)[N], float scale, int log_lanes) {
    float sums[2] = {};
    for (int i = 0; i < N; ++i) {
        sums[0] += head[i] * head[i];
        sums[1] += head[i] * grad[i];
    }
    sum_lanes(sums, log_lanes);
    const HeadGradient g = head_gradient(sums, scale);
    for (int i = 0; i < N; ++i) grad[i] = grad[i] * g.of_grad - head[i] * g.of_head;
    return g.dot;
}

// A warp's sums in shared memory: of q_bias and v_bias, each (heads of a warp, D), and a lane's of log_scale.
template <class T>
constexpr int sums_of_warp = 2 * 32 * per_lane<T> + 32;

// As qk_norm_aligned_kernel: a warp takes as many heads as it has lanes for, the warps of a block every
// eighth token of the chunk. Blocks are numbered with the heads first: neighbours read neighbouring memory.
// budget: registers <= 80, shared <= 17408, blocks >= 3
// sass: LDG.E.128, STG.E.128
template <class T>
__global__ void __launch_bounds__(qk_norm_threads, 3)
    qk_norm_backward_aligned_kernel(const QkNormBackwardParams p, uint32_t head_groups, int log_lanes) {
    ptx::wait_for_previous();
    const uint32_t partial = blockIdx.x / head_groups, group = blockIdx.x % head_groups;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, heads_of_warp = 32u >> log_lanes;
    const uint32_t head = group * heads_of_warp + (lane >> log_lanes);
    const int channel = static_cast<int>(lane & ((1u << log_lanes) - 1)) * per_lane<T>;
    const bool norm = p.log_scale != nullptr;
    const bool here = head < p.heads;  // mask

    uint4 bias_bits = {};
    float scale = 1.0f;
    if (here && norm) {
        bias_bits = ptx::load_16(elements<T>(p.q_bias, head * p.q_bias.h + channel));
        scale = scale_of<T>(p, head);
    }
    float q_sums[per_lane<T>] = {}, v_sums[per_lane<T>] = {}, scale_sum = 0.0f;
    const uint32_t end = chunk_begin(p, partial + 1), length = static_cast<uint32_t>(p.length);
#pragma unroll 1
    for (uint32_t t = chunk_begin(p, partial) + warp; t < end; t += qk_norm_warps) {
        const HeadAt at = {t / length, t % length, head};
        uint4 grad_bits[3] = {}, in_bits[2] = {};
        if (here) {  // all loads before their first use
            for (int i = 0; i < 3; ++i) {
                grad_bits[i] =
                    ptx::load_16(elements<T>(p.grad_out[i], offset_of(p.grad_out[i], at) + channel));
            }
            const int64_t offset = offset_of(p.qkv[0], at) + channel;
            for (int i = 0; i < 2; ++i) {
                if (norm) in_bits[i] = ptx::load_16(elements<T>(p.qkv[i], offset));
            }
        }
        const int64_t offset = offset_of(p.grad_qkv[0], at) + channel;
        float grad[per_lane<T>], in[per_lane<T>], bias[per_lane<T>];
        widen_16<T>(grad_bits[1], grad);
        widen_16<T>(in_bits[1], in);
        if (norm) unnormalize(grad, in, 1.0f, log_lanes);
        if (here) ptx::store_16(elements<T>(p.grad_qkv[1], offset), narrow_16<T>(grad));

        widen_16<T>(grad_bits[2], grad);
        for (int i = 0; i < per_lane<T>; ++i) v_sums[i] += grad[i];
        if (here) ptx::store_16(elements<T>(p.grad_qkv[2], offset), grad_bits[2]);

        widen_16<T>(grad_bits[0], grad);
        widen_16<T>(in_bits[0], in);
        widen_16<T>(bias_bits, bias);
        for (int i = 0; i < per_lane<T>; ++i) in[i] += bias[i];
        if (norm) scale_sum += unnormalize(grad, in, scale, log_lanes);
        for (int i = 0; i < per_lane<T>; ++i) q_sums[i] += grad[i];
        if (here) ptx::store_16(elements<T>(p.grad_qkv[0], offset), narrow_16<T>(grad));
    }

    // over the warps, in order
    float* const sums = reinterpret_cast<float*>(ptx::shared_memory());
    float* const mine = sums + warp * sums_of_warp<T>;
    const bool turned = lane / 4 % 2 == 1;
    store_sums(mine + lane * per_lane<T>, q_sums, turned);
    store_sums(mine + (32 + lane) * per_lane<T>, v_sums, turned);
    mine[64 * per_lane<T> + lane] = scale_sum;
    __syncthreads();
    const auto over_warps = [&](uint32_t i) {
        float sum = 0.0f;
        for (uint32_t w = 0; w < qk_norm_warps; ++w) sum += sums[w * sums_of_warp<T> + i];
        return sum;
    };
    const uint32_t heads = static_cast<uint32_t>(p.heads), first = group * heads_of_warp;
    const uint32_t count = min(heads - first, heads_of_warp), channels = per_lane<T> << log_lanes;
    float* const to = p.scratch + (static_cast<int64_t>(partial) * heads + first) * (2 * channels + 1);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < count * channels; i += qk_norm_threads) {
        const uint32_t h = i / channels, c = i % channels;
        to[h * (2 * channels + 1) + c] = over_warps(i);
        to[h * (2 * channels + 1) + channels + c] = over_warps(32 * per_lane<T> + i);
    }
#pragma unroll 1
    for (uint32_t h = threadIdx.x; h < count; h += qk_norm_threads) {
        to[h * (2 * channels + 1) + 2 * channels] = over_warps(64 * per_lane<T> + (h << log_lanes));
    }
}

}  // namespace var_ext::cuda
