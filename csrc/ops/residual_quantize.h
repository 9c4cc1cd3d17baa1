// residual_quantize: features to tokens, scale by scale, each coding the residual of the coarser ones.
//
//   for each scale:  z = area_downsample(features - f_hat),  tokens = nearest_code(z),
//                    f_hat += phi(bicubic_upsample(codebook[tokens]))
//
// fp32. The last scale, of the size of the features, is not resampled. Backward takes the gradients of f_hat
// after each scale to the codebook and to phi, with the tokens as they were found.
#pragma once

#include <cstdint>
#include <vector>

#include "common/stream.h"
#include "common/tensor_view.h"
#include "ops/nearest_code.h"

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
    float* scratch;  // CUDA alone: residual_quantize_scratch floats; null on the CPU
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
    float* scratch;        // CUDA alone: residual_quantize_backward_scratch floats; null on the CPU
};

// The memory that the CUDA kernels work in, offsets in floats.
struct ResidualQuantizeLayout {
    bool filters;      // whether the search of a scale filters: then there is room for the filter's codes
    int64_t residual;  // (B, C, P, P); the search's own memory stands at 0
    int64_t pooled;    // (B, C, p, p) of a scale
    int64_t size;      // of all

    ResidualQuantizeLayout(int64_t batch, int64_t channels, int64_t codes,
                           const std::vector<int64_t>& patch_nums);
    // Of a scale's search; the codebook lies in the same places for all of them.
    NearestCodeLayout search(int64_t batch, int64_t side, int64_t channels, int64_t codes) const;
};
struct ResidualQuantizeBackwardLayout {
    int64_t codes;  // (B, L, C) gradients of the codes; those of f_hat, (B, C, P, P), stand at 0
    int64_t step;   // see ResidualStepLayout
    int64_t size;

    ResidualQuantizeBackwardLayout(int64_t batch, int64_t channels, const std::vector<int64_t>& patch_nums);
};

// Floats of scratch memory.
int64_t residual_quantize_scratch(int64_t batch, int64_t channels, int64_t codes,
                                  const std::vector<int64_t>& patch_nums);
int64_t residual_quantize_backward_scratch(int64_t batch, int64_t channels,
                                           const std::vector<int64_t>& patch_nums);

// Check the contract; throw std::invalid_argument. `scales` and `scratch` may be null.
ResidualQuantizeParams residual_quantize_params(
    const TensorView& features, const TensorView& codebook, const TensorView& weight, const TensorView& bias,
    const std::vector<int64_t>& phi_index, const std::vector<int64_t>& patch_nums, double ratio, bool cosine,
    const TensorView& tokens, const TensorView& f_hat, const TensorView* scales, const TensorView* scratch);
ResidualQuantizeBackwardParams residual_quantize_backward_params(
    const TensorView& grad_scales, const TensorView& tokens, const TensorView& codebook,
    const TensorView& weight, const std::vector<int64_t>& phi_index, const std::vector<int64_t>& patch_nums,
    double ratio, const TensorView& grad_codebook, const TensorView& grad_weight, const TensorView& grad_bias,
    const TensorView* scratch);

namespace cpu {
void residual_quantize(const ResidualQuantizeParams& p);
void residual_quantize_backward(const ResidualQuantizeBackwardParams& p);  // checks the tokens too
}  // namespace cpu
namespace cuda {
void residual_quantize(const ResidualQuantizeParams& p, const CudaStream& stream);
// The host does not read tokens: those out of range are clamped to the first or the last code.
void residual_quantize_backward(const ResidualQuantizeBackwardParams& p, const CudaStream& stream);
}  // namespace cuda

}  // namespace var_ext
