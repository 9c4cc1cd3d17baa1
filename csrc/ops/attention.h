// Shared by the attention ops: (B, L, H, D) tensors of any strides, the last axis dense.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace var_ext {

struct AttentionHeads {  // (B, L, H, D)
    void* data;
    int64_t stride_b, stride_l, stride_h;  // in elements; D is contiguous
};

struct AttentionParams {
    AttentionHeads q, k, v, out;
    // (B, H, L) contiguous: log of the sum of e^score of each query; null if not needed
    float* lse;
    int64_t batch, queries, keys, heads, dim;
    float scale;
    DType dtype;  // of q, k, v and out: float32, bfloat16 or float16
};

struct AttentionGradients {
    AttentionHeads grad_out;    // in
    AttentionHeads dq, dk, dv;  // out
    float* delta;               // (B, H, L) contiguous: scratch of the CUDA kernels, null for others
};

// Parts of the checks of the ops; they throw std::invalid_argument.
AttentionHeads attention_heads(const char* op, const char* name, const TensorView& view);
void check_per_query(const char* op, const char* name, const TensorView& view,
                     const TensorView& q);  // (B, H, L)

}  // namespace var_ext
