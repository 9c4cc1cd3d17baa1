// residual_step: what a scale's codes add to f_hat, and the next scale's view of it.
//
//   new = f_hat + phi(bicubic_upsample(codes)),  next = area_downsample(new),
//   phi(x) = (1 - ratio) x + ratio (conv3x3(x) + bias)
//
// fp32. Codes of the same size as f_hat are not upsampled. Backward covers only phi and the upsampling: the
// rest is area_downsample_backward and a sum.
#pragma once

#include <cstdint>

#include "common/stream.h"
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
    float* scratch;  // CUDA alone: residual_step_scratch floats; null on the CPU
};

// The memory that the CUDA kernels of backward work in, offsets in floats.
struct ResidualStepLayout {
    int64_t parts;  // of the pixels of all images, whose sums are added up in their order
    int64_t
        sums;  // (parts, C C 9 + C); the gradient before it is taken to the codes, (B, C, H, W), stands at 0
    int64_t size;  // of all

    ResidualStepLayout(int64_t batch, int64_t channels, int64_t height, int64_t width);
};

// Floats of scratch memory for the gradients at (B, C, H, W).
int64_t residual_step_scratch(int64_t batch, int64_t channels, int64_t height, int64_t width);

// How many input channels of the convolution are summed up in one chain: all, or 16 as torch does where the
// codes are not channels-last.
int residual_step_chain(const ResidualStepParams& p);

// Check the contract; throw std::invalid_argument. `next`, the gradients and `scratch` may be null.
ResidualStepParams residual_step_params(const TensorView& f_hat, const TensorView& codes,
                                        const TensorView& weight, const TensorView& bias, double ratio,
                                        const TensorView& out, const TensorView* next);
ResidualStepBackwardParams residual_step_backward_params(const TensorView& grad, const TensorView& codes,
                                                         const TensorView& weight, double ratio,
                                                         const TensorView* grad_codes,
                                                         const TensorView* grad_weight,
                                                         const TensorView* grad_bias,
                                                         const TensorView* scratch);

namespace cpu {
void residual_step(const ResidualStepParams& p);
void residual_step_backward(const ResidualStepBackwardParams& p);
}  // namespace cpu
namespace cuda {
void residual_step(const ResidualStepParams& p, const CudaStream& stream);
void residual_step_backward(const ResidualStepBackwardParams& p, const CudaStream& stream);
}  // namespace cuda

}  // namespace var_ext
