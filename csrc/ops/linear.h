// linear: y = x W^T + b, and its gradients. A kernel of the CPU alone: on a GPU cuBLAS does it.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace var_ext {

// Tensors are contiguous.
struct LinearParams {
    const void* x;       // (rows, inputs)
    const void* weight;  // (outputs, inputs)
    const void* bias;    // (outputs,) or null; not used by backward
    void* out;           // (rows, outputs), dtype of x
    // backward, dtypes of what they are gradients of; null where not wanted
    const void* grad;  // (rows, outputs), dtype of x
    void *grad_x, *grad_weight, *grad_bias;
    DType dtype, weight_dtype, bias_dtype;  // float32 or bfloat16 each; of x first
    int64_t rows, inputs, outputs;
    bool bf16;  // whether factors, and out, are rounded to bfloat16; sums and gradients are float32
};

// Check the contract; throw std::invalid_argument. x, out and grad may have more axes than two.
LinearParams linear_params(const TensorView& x, const TensorView& weight, const TensorView* bias,
                           const TensorView& out, bool bf16);
LinearParams linear_backward_params(const TensorView& grad, const TensorView& x, const TensorView& weight,
                                    const TensorView* grad_x, const TensorView* grad_weight,
                                    const TensorView* grad_bias, bool bf16);

namespace cpu {
void linear(const LinearParams& p);
void linear_backward(const LinearParams& p);
}  // namespace cpu

}  // namespace var_ext
