// cross_entropy: losses of logits, and their gradient. A kernel of the CPU alone: on a GPU it is torch's.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace var_ext {

// Tensors are contiguous; logits, losses and gradients are float32.
struct CrossEntropyParams {
    const float* logits;     // (rows, classes)
    const int64_t* targets;  // (rows,), in 0..classes - 1
    float* losses;           // (rows,)
    // (rows, 2), read by backward: the largest logit, and the log of the sum of exp(logit - largest). Their
    // sum would be rounded to the digits of the larger one.
    float* stats;
    const float* grad;   // backward: (rows,)
    float* grad_logits;  // backward: (rows, classes)
    int64_t rows, classes;
    float smoothing;
};

// Check the contract but for the values of targets; throw std::invalid_argument. Rows may have any axes.
CrossEntropyParams cross_entropy_params(const TensorView& logits, const TensorView& targets,
                                        const TensorView& losses, const TensorView& stats, double smoothing);
CrossEntropyParams cross_entropy_backward_params(const TensorView& grad, const TensorView& logits,
                                                 const TensorView& targets, const TensorView& stats,
                                                 const TensorView& grad_logits, double smoothing);

namespace cpu {
void cross_entropy(const CrossEntropyParams& p);
void cross_entropy_backward(const CrossEntropyParams& p);
}  // namespace cpu

}  // namespace var_ext
