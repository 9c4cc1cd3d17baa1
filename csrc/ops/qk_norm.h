// qk_norm: from packed qkv to the q, k and v of attention.
//   q = (q' + q_bias) / max(|.|, 1e-12) * exp(min(log_scale, log 100)),  k = k' / max(|k'|, 1e-12),
//   v = v' + v_bias; the norms over D, per head. Without log_scale only the biases are added.
// Computed in fp32, whatever is stored. Backward reads qkv again; with n a normed head, r its norm and g =
// scale * grad:
//   grad = (g - n (n . g)) / r, or g / 1e-12 for a head shorter than that.
#pragma once

#include <cstdint>

#include "common/stream.h"
#include "common/tensor_view.h"

namespace var_ext {

// (B, L, H, D) with D contiguous, or (H, D) with b = l = 0; strides in elements.
template <class Pointer>
struct HeadsOf {
    Pointer data = nullptr;
    int64_t b = 0, l = 0, h = 0;
};
using ConstHeads = HeadsOf<const void*>;
using Heads = HeadsOf<void*>;

struct QkNormParams {
    DType dtype;  // of all tensors: float32, bfloat16, float16
    int64_t batch, length, heads, channels;
    ConstHeads qkv[3];          // q', k', v'
    ConstHeads q_bias, v_bias;  // (H, D)
    const void* log_scale;      // (H,), or null: no norm
    int64_t log_scale_stride;
    Heads out[3];  // q, k, v
};

struct QkNormBackwardParams {
    DType dtype;
    int64_t batch, length, heads, channels;
    ConstHeads grad_out[3];
    ConstHeads qkv[3];
    ConstHeads q_bias;
    const void* log_scale;
    int64_t log_scale_stride;
    Heads grad_qkv[3];
    Heads grad_q_bias, grad_v_bias;
    void* grad_log_scale;  // null where log_scale is
    int64_t grad_log_scale_stride;
    // (partials, H, 2 D + 1) contiguous: scratch of the CUDA kernels for sums over tokens; null for others
    float* scratch;
    int64_t partials;
};

// These check the contract; they throw std::invalid_argument. The second checks for another op, which its
// errors name.
QkNormParams qk_norm_params(const TensorView& qkv, const TensorView& q_bias, const TensorView& v_bias,
                            const TensorView* log_scale, const TensorView& q, const TensorView& k,
                            const TensorView& v);
QkNormParams qk_norm_params_of(const char* op, const TensorView& qkv, const TensorView& q_bias,
                               const TensorView& v_bias, const TensorView* log_scale, const TensorView& q,
                               const TensorView& k, const TensorView& v);
QkNormBackwardParams qk_norm_backward_params(const TensorView& grad_q, const TensorView& grad_k,
                                             const TensorView& grad_v, const TensorView& qkv,
                                             const TensorView& q_bias, const TensorView* log_scale,
                                             const TensorView& grad_qkv, const TensorView& grad_q_bias,
                                             const TensorView& grad_v_bias, const TensorView* grad_log_scale,
                                             const TensorView* scratch);

namespace cpu {
void qk_norm(const QkNormParams& p);
void qk_norm_backward(const QkNormBackwardParams& p);
}  // namespace cpu
namespace cuda {
void qk_norm(const QkNormParams& p, const CudaStream& stream);
void qk_norm_backward(const QkNormBackwardParams& p, const CudaStream& stream);
}  // namespace cuda

}  // namespace var_ext
