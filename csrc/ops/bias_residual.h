// bias_residual: y = h + bias + x over maps: the end of a residual branch whose last convolution did not
// add its bias.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/tensor_view.h"

namespace var_ext {

// Maps are contiguous (B, C, pixels), or channels-last (B, pixels, C); all of one call in the same way.
struct BiasResidualParams {
    const void* h;
    const void* x;
    const void* bias;  // (C,), dense
    void* out;         // may be h or x itself
    DType dtype;       // of all: float32, bfloat16, float16; the sum is float32, (h + bias) + x
    int64_t batch, channels, pixels;
    bool channels_last;
};

// Checks the contract; throws std::invalid_argument.
BiasResidualParams bias_residual_params(const TensorView& h, const TensorView& x, const TensorView& bias,
                                        const TensorView& out);

namespace cpu {
void bias_residual(const BiasResidualParams& p);
}  // namespace cpu
namespace cuda {
void bias_residual(const BiasResidualParams& p, const CudaStream& stream);
}  // namespace cuda

}  // namespace var_ext
