// bias_gelu: y = GELU(x + bias) in its tanh form; backward for both arguments.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/tensor_view.h"

namespace var_ext {

struct BiasGeluParams {
    const void* x;     // (rows, C), any row stride
    const void* bias;  // (C,), dense
    const void* grad;  // backward: (rows, C), any row stride
    void* out;         // (rows, C), dense: the output; in backward the gradient of x
    void* grad_bias;   // backward: (C,), dense
    DType dtype;       // of all: float32, bfloat16, float16; the computation is float32
    int64_t rows, channels;
    int64_t x_stride, grad_stride;  // in elements
    // backward: (partials, C), scratch of the CUDA kernels for sums over rows; null for others
    float* scratch;
    int64_t partials;
};

// Check the contract; throw std::invalid_argument. x, grad and out may have more axes than two, (..., C).
BiasGeluParams bias_gelu_params(const TensorView& x, const TensorView& bias, const TensorView& out);
BiasGeluParams bias_gelu_backward_params(const TensorView& grad, const TensorView& x, const TensorView& bias,
                                         const TensorView& grad_x, const TensorView& grad_bias,
                                         const TensorView* scratch);

namespace cpu {
void bias_gelu(const BiasGeluParams& p);
void bias_gelu_backward(const BiasGeluParams& p);
}  // namespace cpu
namespace cuda {
void bias_gelu(const BiasGeluParams& p, const CudaStream& stream);
void bias_gelu_backward(const BiasGeluParams& p, const CudaStream& stream);
}  // namespace cuda

}  // namespace var_ext
