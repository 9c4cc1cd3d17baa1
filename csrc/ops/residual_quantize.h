// residual_quantize: features to tokens, scale by scale, each coding what the coarser ones left.
//
//   for each scale:  z = area_downsample(features - f_hat),  tokens = nearest_code(z),
//                    f_hat += phi(bicubic_upsample(codebook[tokens]))
//
// fp32. The last scale, of the size of the features, is not resampled. Backward takes the gradients of f_hat
// after each scale to the codebook and to phi, with the tokens as they were found.
#pragma once

#include <cstdint>
#include <vector>

#include "common/tensor_view.h"

namespace var_ext {

struct QuantizerShape {
    int64_t batch, channels, side, codes, tokens;  // B, C, P, V, L
    std::vector<int64_t> patch_nums;               // (K,) side of each scale
    std::vector<int64_t> phi_index;                // (K,) which convolution it takes
    float ratio;
};

struct ResidualQuantizeParams {
    QuantizerShape shape;
    const float* features;  // (B, C, P, P)
    const float* codebook;  // (V, C)
    const float* weight;    // (N, C, C, 3, 3), contiguous as all that follows
    const float* bias;      // (N, C)
    int64_t* tokens;        // (B, L)
    float* f_hat;           // (B, C, P, P), features + (f_hat - features) as far as NaN and inf go
    float* scales;          // (K, B, C, P, P) f_hat after each scale; null where it is not wanted
    int64_t features_strides[4], codebook_strides[2];
    bool cosine;
};

struct ResidualQuantizeBackwardParams {
    QuantizerShape shape;
    const float* grad_scales;  // (K, B, C, P, P), contiguous as all but the codebook
    const int64_t* tokens;     // (B, L), each in 0 .. V - 1
    const float* codebook;     // (V, C)
    const float* weight;       // (N, C, C, 3, 3)
    float* grad_codebook;      // (V, C)
    float* grad_weight;        // (N, C, C, 3, 3)
    float* grad_bias;          // (N, C)
    int64_t codebook_strides[2];
    int64_t convolutions;  // N
};

// Check the contract; throw std::invalid_argument.
ResidualQuantizeParams residual_quantize_params(const TensorView& features, const TensorView& codebook,
                                                const TensorView& weight, const TensorView& bias,
                                                const std::vector<int64_t>& phi_index,
                                                const std::vector<int64_t>& patch_nums, double ratio,
                                                bool cosine, const TensorView& tokens,
                                                const TensorView& f_hat, const TensorView* scales);
ResidualQuantizeBackwardParams residual_quantize_backward_params(
    const TensorView& grad_scales, const TensorView& tokens, const TensorView& codebook,
    const TensorView& weight, const std::vector<int64_t>& phi_index, const std::vector<int64_t>& patch_nums,
    double ratio, const TensorView& grad_codebook, const TensorView& grad_weight,
    const TensorView& grad_bias);

namespace cpu {
void residual_quantize(const ResidualQuantizeParams& p);
void residual_quantize_backward(const ResidualQuantizeBackwardParams& p);
}  // namespace cpu

}  // namespace var_ext
