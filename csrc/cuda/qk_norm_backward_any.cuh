// qk_norm backward for heads that do not allow 16-byte accesses.
#pragma once

#include "cuda/qk_norm_backward.cuh"

namespace var_ext::cuda {

// Any number of channels, any alignment: a warp per head and chunk, one window of channels at a time. Each
// window recomputes the norms, but heads longer than one are rare.
// budget: registers <= 80, shared <= 0, blocks >= 3
template <class T>
__global__ void __launch_bounds__(qk_norm_threads, 3)
    qk_norm_backward_any_kernel(const QkNormBackwardParams p, uint32_t tasks) {
    ptx::wait_for_previous();
    constexpr int steps = 4, window = 32 * steps;
    const uint32_t task = blockIdx.x * qk_norm_warps + threadIdx.x / 32;
    const bool here = task < tasks;  // mask
    if (!here) return;
    const int lane = static_cast<int>(threadIdx.x % 32), channels = static_cast<int>(p.channels);
    const uint32_t heads = static_cast<uint32_t>(p.heads), partial = task / heads, head = task % heads;
    const bool norm = p.log_scale != nullptr;
    const T* const q_bias = elements<T>(p.q_bias, head * p.q_bias.h);
    const float scale = norm ? scale_of<T>(p, head) : 1.0f;
    float* const to = p.scratch + static_cast<int64_t>(task) * (2 * channels + 1);

    for (int first = 0; first == 0 || first < channels; first += window) {
        float q_sums[steps] = {}, v_sums[steps] = {}, scale_sum = 0.0f;
        const uint32_t end = chunk_begin(p, partial + 1), length = static_cast<uint32_t>(p.length);
#pragma unroll 1
        for (uint32_t t = chunk_begin(p, partial); t < end; ++t) {
            const HeadAt at = {t / length, t % length, head};
            const int64_t offset = offset_of(p.qkv[0], at);
            const T *q = elements<T>(p.qkv[0], offset), *k = elements<T>(p.qkv[1], offset);
            const T* grad_q = elements<T>(p.grad_out[0], offset_of(p.grad_out[0], at));
            const T* grad_k = elements<T>(p.grad_out[1], offset_of(p.grad_out[1], at));
            const T* grad_v = elements<T>(p.grad_out[2], offset_of(p.grad_out[2], at));
            HeadGradient of_q, of_k;
            if (norm) {
                float q_dots[2] = {}, k_dots[2] = {};
#pragma unroll 1
                for (int c = lane; c < channels; c += 32) {
                    const float u = widen(q[c]) + widen(q_bias[c]), w = widen(k[c]);
                    q_dots[0] += u * u;
                    q_dots[1] += u * widen(grad_q[c]);
                    k_dots[0] += w * w;
                    k_dots[1] += w * widen(grad_k[c]);
                }
                sum_lanes(q_dots, 5);
                sum_lanes(k_dots, 5);
                of_q = head_gradient(q_dots, scale);
                of_k = head_gradient(k_dots, 1.0f);
                scale_sum += of_q.dot;
            }
            const int64_t to_offset = offset_of(p.grad_qkv[0], at);
            for (int i = 0; i < steps; ++i) {
                const int c = first + lane + 32 * i;
                const bool inside = c < channels;  // mask
                if (!inside) continue;
                float u = 0.0f, w = 0.0f;  // without a norm, qkv does not matter, be it infinite
                if (norm) {
                    u = widen(q[c]) + widen(q_bias[c]);
                    w = widen(k[c]);
                }
                u = widen(grad_q[c]) * of_q.of_grad - u * of_q.of_head;
                w = widen(grad_k[c]) * of_k.of_grad - w * of_k.of_head;
                const float x = widen(grad_v[c]);
                q_sums[i] += u;
                v_sums[i] += x;
                elements<T>(p.grad_qkv[0], to_offset)[c] = narrow<T>(u);
                elements<T>(p.grad_qkv[1], to_offset)[c] = narrow<T>(w);
                elements<T>(p.grad_qkv[2], to_offset)[c] = narrow<T>(x);
            }
        }
        for (int i = 0; i < steps; ++i) {
            const int c = first + lane + 32 * i;
            const bool inside = c < channels;  // mask
            if (!inside) continue;
            to[c] = q_sums[i];
            to[channels + c] = v_sums[i];
        }
        to[2 * channels] = scale_sum;  // the same in all lanes and windows
    }
}

}  // namespace var_ext::cuda
