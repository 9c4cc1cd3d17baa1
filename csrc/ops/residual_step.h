// residual_step: what a scale's codes add to f_hat, and the next scale's view of it.
//
//   new = f_hat + phi(bicubic_upsample(codes)),  next = area_downsample(new),
//   phi(x) = (1 - ratio) x + ratio (conv3x3(x) + bias)
//
// fp32. Codes that have the size of f_hat already are taken as they are. Backward is that of phi and the
// upsampling alone: the rest of it is area_downsample_backward and a sum.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"
#include "ops/resample.h"

namespace var_ext {

struct ResidualStepParams {
    const float* f_hat;   // (B, C, H, W)
    const float* codes;   // (B, C, h, w)
    const float* weight;  // (C, C, 3, 3), contiguous
    const float* bias;    // (C,), contiguous
    float* out;           // (B, C, H, W)
    bool has_next;
    ResampleParams next;  // from `out`
    int64_t batch, channels, height, width, codes_height, codes_width;
    int64_t f_hat_strides[4], codes_strides[4], out_strides[4];
    float ratio;
};

struct ResidualStepBackwardParams {
    const float* grad;    // (B, C, H, W), of phi
    const float* codes;   // (B, C, h, w)
    const float* weight;  // (C, C, 3, 3), contiguous
    float* grad_codes;    // (B, C, h, w); null where it is not wanted, like the next two
    float* grad_weight;   // (C, C, 3, 3), contiguous
    float* grad_bias;     // (C,), contiguous
    int64_t batch, channels, height, width, codes_height, codes_width;
    int64_t grad_strides[4], codes_strides[4], grad_codes_strides[4];
    float ratio;
};

// Check the contract; throw std::invalid_argument. `next` and the gradients may be null.
ResidualStepParams residual_step_params(const TensorView& f_hat, const TensorView& codes,
                                        const TensorView& weight, const TensorView& bias, double ratio,
                                        const TensorView& out, const TensorView* next);
ResidualStepBackwardParams residual_step_backward_params(const TensorView& grad, const TensorView& codes,
                                                         const TensorView& weight, double ratio,
                                                         const TensorView* grad_codes,
                                                         const TensorView* grad_weight,
                                                         const TensorView* grad_bias);

namespace cpu {
void residual_step(const ResidualStepParams& p);
void residual_step_backward(const ResidualStepBackwardParams& p);
}  // namespace cpu

}  // namespace var_ext
