// The contract of group_norm_silu, forward and backward.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/tensor_view.h"

namespace var_ext {

// Maps are contiguous (B, C, pixels), or channels-last (B, pixels, C); all of one call in the same way.
struct GroupNormSiluParams {
    const void* x;
    const void* weight;      // (C,), any stride
    const void* bias;        // (C,), any stride
    const void* input_bias;  // (C,), any stride, added to x first; null for none
    const void* grad;        // backward: the gradient of the output
    void* out;               // the output; in backward the gradient of x
    void* grad_weight;       // backward: (C,), dense
    void* grad_bias;         // backward: (C,), dense
    DType dtype;             // of all: float32, bfloat16, float16; sums are fp32 and wider
    int64_t batch, channels, pixels, groups;
    int64_t weight_stride, bias_stride, input_bias_stride;  // in elements
    double eps;
    bool channels_last;
    // Of the CUDA kernels, float32, null for others. stats, (B, groups, 2): mean and 1 / deviation, which
    // forward leaves for backward; scratch, (B, partials, C, 2): sums over chunks of pixels; means,
    // (B, groups, 2): scratch of backward.
    float *stats, *scratch, *means;
    int64_t partials;
};

// Check the contract; throw std::invalid_argument.
GroupNormSiluParams group_norm_silu_params(const TensorView& x, const TensorView& weight,
                                           const TensorView& bias, const TensorView* input_bias,
                                           const TensorView& out, const TensorView* stats,
                                           const TensorView* scratch, int64_t groups, double eps);
GroupNormSiluParams group_norm_silu_backward_params(const TensorView& grad, const TensorView& x,
                                                    const TensorView& weight, const TensorView& bias,
                                                    const TensorView* input_bias, const TensorView& grad_x,
                                                    const TensorView& grad_weight,
                                                    const TensorView& grad_bias, const TensorView* stats,
                                                    const TensorView* means, const TensorView* scratch,
                                                    int64_t groups, double eps);

namespace cpu {
void group_norm_silu(const GroupNormSiluParams& p);
void group_norm_silu_backward(const GroupNormSiluParams& p);
}  // namespace cpu
namespace cuda {
void group_norm_silu(const GroupNormSiluParams& p, const CudaStream& stream);
void group_norm_silu_backward(const GroupNormSiluParams& p, const CudaStream& stream);
}  // namespace cuda

}  // namespace var_ext
