// The last step of qk_norm's backward: sums over chunks of tokens become gradients of biases and log_scale.
#pragma once

#include "cuda/qk_norm_common.cuh"

namespace var_ext::cuda {

constexpr unsigned qk_norm_add_threads = 512, qk_norm_add_warps = qk_norm_add_threads / 32;

// Adds the chunks: a warp every sixteenth of them in 32 neighbouring columns, then over the warps.
// budget: registers <= 32, shared <= 2048, blocks >= 4
template <class T>
__global__ void __launch_bounds__(qk_norm_add_threads, 4) qk_norm_add_kernel(const QkNormBackwardParams p) {
    const int64_t width = 2 * p.channels + 1, columns = p.heads * width;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
    const bool here = column < columns;  // mask
    float sum = 0.0f;
    if (here) {
#pragma unroll 4
        for (int64_t i = threadIdx.x / 32; i < p.partials; i += qk_norm_add_warps) {
            sum += p.scratch[i * columns + column];
        }
    }
    float* const sums = reinterpret_cast<float*>(ptx::shared_memory());  // (warps, 32)
    sums[threadIdx.x] = sum;
    __syncthreads();
    const bool adds = here && threadIdx.x < 32;  // mask
    if (!adds) return;
    float total = 0.0f;
    for (unsigned w = 0; w < qk_norm_add_warps; ++w) total += sums[w * 32 + threadIdx.x];

    const int64_t h = column / width, c = column % width;
    if (c < p.channels) {
        elements<T>(p.grad_q_bias, h * p.grad_q_bias.h)[c] = narrow<T>(total);
    } else if (c < 2 * p.channels) {
        elements<T>(p.grad_v_bias, h * p.grad_v_bias.h)[c - p.channels] = narrow<T>(total);
    } else if (p.log_scale != nullptr) {
        const float log_scale = widen(static_cast<const T*>(p.log_scale)[h * p.log_scale_stride]);
        const bool capped = log_scale > qk_norm_max_log_scale;
        static_cast<T*>(p.grad_log_scale)[h * p.grad_log_scale_stride] = narrow<T>(capped ? 0.0f : total);
    }
}

}  // namespace var_ext::cuda
