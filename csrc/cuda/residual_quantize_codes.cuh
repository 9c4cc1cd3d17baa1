// Inputs and outputs of residual_quantize kernels that nearest_code and residual_step do not have.
#pragma once

#include "cuda/nearest_code_pack.cuh"
#include "cuda/residual_step_phi.cuh"

namespace var_ext::cuda {

// The codes of a scale's tokens, as a grid.
struct TokenCodes {
    const float* codebook;
    int64_t stride_code, stride, last;
    const int64_t* tokens;  // of the first image's scale
    int64_t image_stride;
    int side;
    __device__ int64_t stride_channel() const { return stride; }
    __device__ const float* pixel(int64_t b, int y, int x) const {
        const int64_t token = tokens[b * image_stride + y * side + x];
        return codebook + min(max(token, int64_t{0}), last) * stride_code;
    }
};

// The pixels of all images as vectors to search for.
struct PixelRows {
    PhiGrid grid;
    int side;
    __device__ float operator()(int64_t row, int c) const {
        const int64_t image = row / (side * side);
        const int pixel = static_cast<int>(row - image * (side * side));
        return grid.pixel(image, pixel / side, pixel % side)[c * grid.stride_channel()];
    }
};

// f_hat += phi, and the residual of the features, which the next scale pools. All but the features are
// (B, C, P, P) contiguous.
struct QuantizeStep {
    PhiGrid features;
    float *f_hat, *residual, *scale;  // scale: null if not needed
    int channels, side;
    bool first, last;
    __device__ float operator()(int64_t b, int c, int y, int x, float phi) const {
        const int64_t at = ((b * channels + c) * side + y) * side + x;
        const float feature = features.pixel(b, y, x)[c * features.stride_channel()];
        const float sum = first ? phi : plus(phi, f_hat[at]);
        const float rest = plus(feature, -sum);
        if (scale != nullptr) scale[at] = sum;
        f_hat[at] = last ? plus(sum, plus(feature, -feature)) : sum;  // NaN for features that are not finite
        residual[at] = rest;
        return rest;
    }
};

// Gradients of codes token by token: (B, L, C).
struct TokenStore {
    float* data;
    int64_t tokens;  // of an image
    int channels, side;
    __device__ float operator()(int64_t b, int c, int y, int x, float value) const {
        data[(b * tokens + y * side + x) * channels + c] = value;
        return value;
    }
};

constexpr unsigned quantize_threads = 256;

// to += from, or = from.
// budget: registers <= 32, shared <= 0, blocks >= 6
template <bool adds>
__global__ void __launch_bounds__(quantize_threads, 6)
    residual_quantize_sum_kernel(float* to, const float* from, int64_t count) {
    ptx::wait_for_previous();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * quantize_threads + threadIdx.x;
    const bool here = i < count;  // mask
    if (here) to[i] = (adds ? to[i] : 0.0f) + from[i];
}

// The gradients of convolutions that no scale uses.
// budget: registers <= 16, shared <= 0, blocks >= 6
template <bool>
__global__ void __launch_bounds__(quantize_threads, 6)
    residual_quantize_clear_kernel(float* to, int64_t count) {
    ptx::wait_for_previous();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * quantize_threads + threadIdx.x;
    const bool here = i < count;  // mask
    if (here) to[i] = 0.0f;
}

// Codes whose gradients a warp sums in shared memory, in token order: each lane has its channels.
constexpr int quantize_codes = 32, quantize_codebook_threads = 32;

// budget: registers <= 64, shared <= 163840, blocks >= 1, on sm_86 >= 0
template <bool>
__global__ void __launch_bounds__(quantize_codebook_threads, 16)
    residual_quantize_codebook_kernel(const int64_t* tokens, const float* grads, int64_t count, int64_t codes,
                                      int channels, float* grad_codebook) {
    ptx::wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * quantize_codes;
    float* const sums = reinterpret_cast<float*>(ptx::shared_memory());  // (32, C)
    for (int code = 0; code < quantize_codes; ++code) {
        for (int c = lane; c < channels; c += 32) sums[code * channels + c] = 0.0f;
    }
#pragma unroll 1
    for (int64_t begin = 0; begin < count; begin += 32) {
        const bool there = begin + lane < count;  // mask
        int64_t code = there ? tokens[begin + lane] : -1;
        if (there) code = min(max(code, int64_t{0}), codes - 1);
        const int mine = code >= first && code < first + quantize_codes ? static_cast<int>(code - first) : -1;
        const unsigned found = __ballot_sync(0xffffffff, mine >= 0);
        for (int from = 0; from < 32 && found >> from != 0; ++from) {
            if ((found >> from & 1) == 0) continue;
            const int at = __shfl_sync(0xffffffff, mine, from);
            const float* const grad = grads + (begin + from) * channels;
            for (int c = lane; c < channels; c += 32) sums[at * channels + c] += grad[c];
        }
    }
    for (int code = 0; code < quantize_codes; ++code) {
        const bool here = first + code < codes;  // mask
        if (!here) break;
        float* const to = grad_codebook + (first + code) * channels;
        for (int c = lane; c < channels; c += 32) to[c] = sums[code * channels + c];
    }
}

}  // namespace var_ext::cuda
