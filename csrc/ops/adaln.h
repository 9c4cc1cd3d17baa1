// adaln: y = LayerNorm(h) * (1 + scale) + shift over the last axis, where h = x, or with the residual
// h = x + gate * branch. The variance is the biased one, eps is added to it. Computed in fp32.
//
// Backward reads x (and branch) again instead of statistics kept by forward. With n the normed h and
// g = grad_y * (1 + scale):
//   grad_x = (g - mean(g) - n mean(g n)) / std + grad_h,   grad_branch = gate * grad_x,
//   grad_scale = sum over L of grad_y n,  grad_shift = of grad_y,  grad_gate = of grad_x branch.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/tensor_view.h"

namespace var_ext {

// (B, L, C) with C contiguous, or (B, C) with l = 0; strides in elements.
template <class Pointer>
struct RowsOf {
    Pointer data = nullptr;
    int64_t b = 0, l = 0;
};
using ConstRows = RowsOf<const void*>;
using Rows = RowsOf<void*>;

struct AdalnParams {
    DType dtype;  // of all tensors: float32, bfloat16, float16
    int64_t batch, length, channels;
    float eps;
    ConstRows x, scale, shift;
    ConstRows branch, gate;  // null: no residual
    Rows h, y;               // h is null without a residual
};

struct AdalnBackwardParams {
    DType dtype;
    int64_t batch, length, channels;
    float eps;
    ConstRows grad_y, x, scale;
    ConstRows grad_h, branch, gate;  // null: no residual
    Rows grad_x, grad_scale, grad_shift;
    Rows grad_branch, grad_gate;  // null without a residual
    // (B, partials, vectors, C) contiguous, of scale, shift and gate: scratch of the CUDA kernels for sums
    // over chunks of rows; null for others
    float* scratch;
    int64_t partials;
};

// These check the contract and throw std::invalid_argument. branch, gate and what depends on them are all
// null or none.
AdalnParams adaln_params(const TensorView& x, const TensorView& scale, const TensorView& shift,
                         const TensorView* branch, const TensorView* gate, const TensorView* h,
                         const TensorView& y, double eps);
AdalnBackwardParams adaln_backward_params(const TensorView& grad_y, const TensorView& x,
                                          const TensorView& scale, const TensorView* grad_h,
                                          const TensorView* branch, const TensorView* gate,
                                          const TensorView& grad_x, const TensorView& grad_scale,
                                          const TensorView& grad_shift, const TensorView* grad_branch,
                                          const TensorView* grad_gate, const TensorView* scratch, double eps);

namespace cpu {
void adaln(const AdalnParams& p);
void adaln_backward(const AdalnBackwardParams& p);
}  // namespace cpu
namespace cuda {
void adaln(const AdalnParams& p, const CudaStream& stream);
void adaln_backward(const AdalnBackwardParams& p, const CudaStream& stream);
}  // namespace cuda

}  // namespace var_ext
