// The last step of qk_norm's backward: sums over chunks of tokens become gradients of biases and log_scale.
#pragma once

#include "cuda/qk_norm_common.cuh"

namespace var_ext::cuda {

// budget: registers <= 32, shared <= 2048, blocks >= 3
template <class T>
__global__ void __launch_bounds__(sum_columns_threads, 3) qk_norm_add_kernel(const QkNormBackwardParams p) {
    ptx::wait_for_previous();
    const int64_t width = 2 * p.channels + 1, columns = p.heads * width;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
    const bool here = column < columns;  // mask
    float* const shared = reinterpret_cast<float*>(ptx::shared_memory());
    const float total = sum_columns(p.scratch + column, p.partials, columns, here, shared);
    const bool adds = here && threadIdx.x < 32;  // mask
    if (!adds) return;

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
